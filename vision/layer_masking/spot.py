"""Spot: what a tensor of a watched pass is known to be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from skipguide.errors import SkipError

if TYPE_CHECKING:
    from skipguide.vision.layer_masking.run import MaskedRun

TAG = "_skipguide_spot"


class Spot:
    """What is known of a tensor: which activation it is (None: no positions), and where its positions are."""

    __slots__ = ("dims", "number", "padded", "positive", "run")

    def __init__(
        self,
        run: MaskedRun,
        number: int | None,
        dims: tuple[int, int] = (-2, -1),
        positive: bool = False,
        padded: bool = False,
    ) -> None:
        self.run, self.number, self.dims, self.positive, self.padded = run, number, dims, positive, padded


def spot_of(value: object) -> Spot | None:
    """The spot of a tensor, if it has one."""
    return getattr(value, TAG, None) if isinstance(value, Tensor) else None


def spot_at(tensor: Tensor) -> Spot:
    """The spot of a tensor that has one."""
    spot: Spot = getattr(tensor, TAG)
    return spot


def number_of(tensor: Tensor) -> int:
    """Which activation a tensor is."""
    number = spot_at(tensor).number
    assert number is not None
    return number


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors among arguments, also in lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def laid(part: Tensor, dims: tuple[int, int], ndim: int) -> Tensor:
    """A `[R, 1, H, W]` map in the layout of an activation."""
    if ndim == 4:
        return part if dims == (-2, -1) else part.movedim((-2, -1), dims)
    if ndim == 3 and dims == (-2, -1):
        return part[:, 0]
    raise SkipError(f"expected activations [N, C, H, W]; got {ndim} dimensions")


def cast(x: Tensor, like: Tensor) -> Tensor:
    """In the activation's precision."""
    return x if x.dtype == like.dtype else x.to(like.dtype)
