"""Layer skipping in language models."""
