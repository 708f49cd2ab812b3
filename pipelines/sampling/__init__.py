"""What happens while a pipeline samples: which call it is, what a step runs, and how the result is delivered."""
