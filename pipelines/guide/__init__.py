"""Guiders of diffusers on classic pipelines: `Guide(guider).apply(pipe)`."""
