"""cache-dit: how it marks the pipelines and models that it caches."""

from __future__ import annotations

from typing import Any

from torch import nn

from skipguide.hosts.wrappers import unwrap

NAME = "cache-dit"


def is_cached(target: Any) -> bool:
    """Whether cache-dit caches this pipeline or model. It counts forwards to know the step, so no pass may be added.

    It marks models one by one, but of a pipeline the class. What it keeps of one pipeline is on that pipeline, so that
    another of the same class is not taken for cached.
    """
    own = (
        [vars(unwrap(target)), target.__dict__] if isinstance(target, nn.Module) else [getattr(target, "__dict__", {})]
    )
    if any(each.get("_is_cached") for each in own):
        return True
    return bool(getattr(type(target), "_is_cached", False)) and any("_context_manager" in each for each in own)
