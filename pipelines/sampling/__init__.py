"""What happens while a pipeline samples: who calls, what a step runs, and how the result is handed over."""
