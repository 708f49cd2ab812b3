"""cache-dit: how it marks the pipelines and models that it caches."""

from __future__ import annotations


def is_cached(target: object) -> bool:
    """Whether cache-dit caches this pipeline or model. It counts forwards to know the step, so no pass may be added."""
    return bool(getattr(target, "_is_cached", False))
