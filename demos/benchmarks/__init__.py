"""Benchmarks: each is one command that writes a JSON and a Markdown table next to itself."""
