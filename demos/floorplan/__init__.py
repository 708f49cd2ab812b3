"""Training a floor plan net, and a study of what the layout graph is worth."""
