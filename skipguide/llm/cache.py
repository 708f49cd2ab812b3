"""Cache: KV caches in which some layers are left out, and the mark that says under which plan a cache was made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from skipguide.errors import SkipError
from skipguide.hosts.kv_cache import check_kind, hide, length
from skipguide.llm.plan_data import SublayerPlanData

_MARK = "_skipguide_mark"


@dataclass
class Mark:
    """What a cache knows of the plan it is filled under.

    Attributes:
        plan: the plan.
        hidden: whether the layers of left-out attention are gone from the cache.
        filled: whether a pass went into it.
        decoded: whether tokens were decoded on it.
        extra: feed-forwards left out in this sequence beyond the plan -> scale.
        stood_for: cache layer -> class of the layer that is gone, for the account of memory.
        kinds: a layer of each kind, how many hold keys, how many are gone; None until the first pass is over.
    """

    plan: SublayerPlanData
    hidden: bool = False
    filled: bool = False
    decoded: bool = False
    extra: dict[int, float | None] = field(default_factory=dict)
    stood_for: dict[int, type] = field(default_factory=dict)
    kinds: list[tuple[int, int, int]] | None = None


def mark_of(cache: Any) -> Mark | None:
    """The mark of a cache, if it has one."""
    mark: Mark | None = getattr(cache, _MARK, None)
    return mark


def set_mark(cache: Any, mark: Mark) -> None:
    """Write the mark on a cache."""
    setattr(cache, _MARK, mark)


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
