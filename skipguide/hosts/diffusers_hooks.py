"""The hooks of diffusers: which of them stay in front of a gate, and where they keep the forward that they wrapped."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from skipguide.hosts import diffusers_caches

# By the beginnings of their names. Context parallelism splits what a block is given, caches answer in its place, and
# the two of group offloading that watch the first pass take themselves off in it.
IN_FRONT = (
    *("cp_input", "cp_output", "layer_execution_tracker", "lazy_prefetch_group_offloading"),
    *diffusers_caches.IN_FRONT,
)
# Those that exchange the memory behind a weight around each run of its module.
MOVING = ("group_offloading", "layerwise_casting")


def moves_weights(names: Iterable[str]) -> bool:
    """Whether hooks of these names exchange the memory behind a module's weights whenever it runs."""
    return any(name.startswith(MOVING) for name in names)


def only_moves(names: Iterable[str]) -> bool:
    """Whether hooks of these names change nothing that a block computes: others may do something else in every run.

    A cache that answers for all blocks at once leaves each as it is; whether it answers, its record says.
    """
    passive = (
        *(*MOVING, "peft_autocast_disable", "layer_execution_tracker", "lazy_prefetch_group_offloading"),
        *diffusers_caches.FOR_ALL_BLOCKS,
    )
    return all(name.startswith(passive) for name in names)


def hooks_on(module: nn.Module, classes: Collection[str]) -> list[Any]:
    """The hooks on a module whose classes have one of these names."""
    registry = module.__dict__.get("_diffusers_hook")
    return [hook for hook in registry.hooks.values() if type(hook).__name__ in classes] if registry is not None else []


def place_behind(module: nn.Module) -> tuple[Any, str] | None:
    """Where a gate stands behind the hooks that have to stay in front of it: holder and attribute; None without any."""
    registry = module.__dict__.get("_diffusers_hook")
    if registry is None:
        return None
    for name, reference in zip(registry._hook_order, registry._fn_refs, strict=True):  # innermost first
        if name.startswith(IN_FRONT):
            return reference, "forward" if reference.original_forward is None else "original_forward"
    return None


def is_behind_offload(gate: object, module: nn.Module) -> bool:
    """Whether group offloading stands in front of a gate: its blocks would be loaded to be skipped."""
    registry = module.__dict__.get("_diffusers_hook")
    if registry is None or (hook := registry.hooks.get("group_offloading")) is None:
        return False
    return hook.fn_ref.forward is gate


def is_behind(gate: object, module: nn.Module) -> bool:
    """Whether something stands in front of a gate that belongs behind it."""
    return is_behind_offload(gate, module) or is_behind_cache(gate, module)


def is_behind_cache(gate: object, module: nn.Module) -> bool:
    """Whether the hook that a cache has on the model itself stands in front of a gate: it would see one pass only."""
    registry = module.__dict__.get("_diffusers_hook")
    if registry is None:
        return False
    refs = [ref for name, ref in zip(registry._hook_order, registry._fn_refs, strict=True) if _at_the_model(name)]
    return any(gate is each for ref in refs for each in (ref.forward, ref.original_forward))


def _at_the_model(name: str) -> bool:
    return name.startswith(diffusers_caches.AT_THE_MODEL)


def places(module: nn.Module) -> list[tuple[Any, str]]:
    """Where the hooks on a module keep the forward that they wrapped: holders and attributes."""
    references = getattr(module.__dict__.get("_diffusers_hook"), "_fn_refs", ())
    return [(reference, name) for reference in references for name in ("forward", "original_forward")]
