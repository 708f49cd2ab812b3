"""What is known of a tensor while a model runs under masks; it is kept as an attribute of the tensor itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

from skipguide.errors import SkipError

TAG = "_skipguide_activation"


class HasMasks(Protocol):
    """A pass that knows the mask of each of its activations."""

    def mask(self, number: int) -> Tensor:
        """The mask of an activation."""
        ...


class ActivationInfo:
    """What is known of a tensor.

    Attributes:
        owner: the pass that made it; what other passes noted is ignored.
        number: which of the pass's activations it is; None for a tensor without positions, such as a pooled one.
        dims: which dimensions are height and width, counted from the end.
        positive: its values are known to be 0 or more (it comes from a ReLU).
        padded: the operation before padded and filled it.
        constant: it has no positions and was made of nothing that has or had any.
    """

    __slots__ = ("constant", "dims", "number", "owner", "padded", "positive")

    def __init__(
        self,
        owner: HasMasks,
        number: int | None,
        dims: tuple[int, int] = (-2, -1),
        positive: bool = False,
        padded: bool = False,
        constant: bool = False,
    ) -> None:
        self.constant = constant
        self.owner, self.number, self.dims, self.positive, self.padded = owner, number, dims, positive, padded


def info_of(value: object) -> ActivationInfo | None:
    """What is known of a tensor, if anything is."""
    return getattr(value, TAG, None) if isinstance(value, Tensor) else None


def info_at(tensor: Tensor) -> ActivationInfo:
    """What is known of a tensor of which something is known."""
    info: ActivationInfo = getattr(tensor, TAG)
    return info


def number_of(tensor: Tensor) -> int:
    """Which activation a tensor is."""
    number = info_at(tensor).number
    assert number is not None
    return number


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors among arguments, also in lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def in_layout(part: Tensor, dims: tuple[int, int], ndim: int) -> Tensor:
    """A `[R, 1, H, W]` map in the dimension order of an activation, so that the two can be multiplied."""
    if ndim == 4:
        return part if dims == (-2, -1) else part.movedim((-2, -1), dims)
    if ndim == 3 and dims == (-2, -1):
        return part[:, 0]
    raise SkipError(f"expected activations [N, C, H, W]; got {ndim} dimensions")


def cast_like(x: Tensor, like: Tensor) -> Tensor:
    """The tensor in the precision of another."""
    return x if x.dtype == like.dtype else x.to(like.dtype)
