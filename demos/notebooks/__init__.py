"""Notebooks with their outputs, which run on a CPU with what ships."""
