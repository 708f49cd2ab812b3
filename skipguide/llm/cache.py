"""Cache: KV caches in which some layers are left out, and the mark that says under which plan a cache was made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache as once
from typing import Any

from skipguide.errors import SkipError
from skipguide.llm.plan import SublayerPlan

_MARK = "_skipguide_mark"


@dataclass
class Mark:
    """What a cache knows of the plan it is filled under.

    Attributes:
        plan: the plan.
        hidden: whether the layers of left-out attention are gone from the cache.
        filled: whether a pass went into it.
        extra: feed-forwards left out in this sequence beyond the plan -> scale.
        stood_for: cache layer -> class of the layer that is gone, for the account of memory.
    """

    plan: SublayerPlan
    hidden: bool = False
    filled: bool = False
    extra: dict[int, float | None] = field(default_factory=dict)
    stood_for: dict[int, type] = field(default_factory=dict)


def mark_of(cache: Any) -> Mark | None:
    """The mark of a cache, if it has one."""
    mark: Mark | None = getattr(cache, _MARK, None)
    return mark


def set_mark(cache: Any, mark: Mark) -> None:
    """Write the mark on a cache."""
    setattr(cache, _MARK, mark)


@once
def _placeholder() -> type | None:
    from transformers import cache_utils

    return getattr(cache_utils, "DummyLayer", None)


def _stand_in(kept: Any) -> Any:
    """A cache layer that holds nothing, and of which lengths and mask sizes are never asked, or rightly answered."""
    if (dummy := _placeholder()) is not None:
        return dummy()
    from skipguide.llm.placeholder import placeholder

    return placeholder(kept)


def is_stand_in(layer: Any) -> bool:
    """Whether a cache layer holds nothing by design."""
    dummy = _placeholder()
    return isinstance(layer, dummy) if dummy is not None else type(layer).__name__ == "Placeholder"


def check_kind(cache: Any) -> None:
    """Refuse caches that are no list of layers."""
    if not isinstance(getattr(cache, "layers", None), list) or hasattr(cache, "self_attention_cache"):
        raise SkipError(
            f"expected a transformers Cache with a list of layers (DynamicCache, StaticCache, ...); got "
            f"{type(cache).__name__}"
        )


def length(cache: Any) -> int:
    """Tokens in a cache; a static cache on a GPU is waited for."""
    return int(cache.get_seq_length())


def grow(cache: Any, layers: int) -> None:
    """Make the layers of a cache that adds them at their first use."""
    if (make := getattr(cache, "layer_class_to_replicate", None)) is not None:
        while len(cache.layers) < layers:
            cache.layers.append(make())


def hide(cache: Any, indices: Sequence[int], layers: int) -> dict[int, Any]:
    """Take the layers `indices` out of a cache: their keys and values are freed, the lengths of the others hold.

    Returns:
        index -> the layer that stood there.
    """
    grow(cache, layers)
    gone = {i: cache.layers[i] for i in indices if not is_stand_in(cache.layers[i])}
    kept = next(layer for i, layer in enumerate(cache.layers) if i not in gone and not is_stand_in(layer))
    for i in gone:
        cache.layers[i] = _stand_in(kept)
    return gone


@contextmanager
def hidden(cache: Any, indices: Sequence[int], layers: int) -> Iterator[None]:
    """Take layers out of a cache for a while; the same layer objects, untouched, stand there afterwards.

    What was added to the other layers meanwhile is taken away again.
    """
    check_kind(cache)
    if not getattr(cache, "is_croppable", False) and length(cache):
        raise SkipError(f"a draft must be taken back from the cache, and a {type(cache).__name__} cannot be cropped")
    before = length(cache)
    gone = hide(cache, indices, layers)
    try:
        yield
    finally:
        added = length(cache) - before
        if added > 0:
            cache.crop(-added)
        for i, layer in gone.items():
            cache.layers[i] = layer


def kv_bytes(cache: Any, mark: Mark | None) -> tuple[int, int]:
    """Bytes of keys and values held, and bytes that the layers that are gone would hold, as their likes do."""
    held, by_class = 0, dict[type, int]()
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is not None and values is not None:
            size = keys.nbytes + values.nbytes
            held += size
            by_class.setdefault(type(layer), size)
    some = next(iter(by_class.values()), 0)
    return held, sum(by_class.get(cls, some) for cls in mark.stood_for.values()) if mark else 0
