"""The operations of a model as geometry: what each does to masks, and which positions of its input it reads.

A position is known where it is visible, or was computed from at least one visible position.

Masks are bool `[R, 1, H, W]`, R = rows of the batch, or 1 for all of them. Nothing here looks at data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from skipguide.errors import SkipError
from skipguide.vision.layer_masking.masks import Box, Pair, both, move, padded, size_of, whole, windows


@dataclass(frozen=True)
class Op:
    """One operation of the model on masked activations.

    Attributes:
        name: torch's name for it.
        inputs: numbers of the masked activations that it takes.
    """

    name: str
    inputs: tuple[int, ...]

    @cached_property
    def kind_of(self) -> tuple[object, ...]:
        """Everything but the name and the inputs: operations of one kind are run alike on the same masks."""
        return (type(self), *(getattr(self, f.name) for f in fields(self) if f.name not in ("name", "inputs")))

    def mask(self, masks: Sequence[Tensor]) -> Tensor | None:
        """The positions that are known after it; None if its result has no positions."""
        known = masks[0]
        for other in masks[1:]:
            known = both(known, other)
        return known

    def reach(self, need: Tensor | None, mask: Tensor) -> Tensor:
        """The positions of its input that it reads for the needed outputs, hidden ones too."""
        return torch.ones_like(mask)

    @cached_property
    def rounds(self) -> int:
        """Rounds of fill that are always enough."""
        return 0


@dataclass(frozen=True)
class Pointwise(Op):
    """Reads the same position of every input: visible where all of them are."""


@dataclass(frozen=True)
class Window(Op):
    """A convolution or a pooling.

    Attributes:
        kind: conv, max or avg.
        kernel: height and width.
        stride: the same.
        padding: top, bottom, left, right.
        dilation: height and width.
        ceil: PyTorch's `ceil_mode`.
        include_pad: whether an average counts the padding.
        positive: the input is known to be 0 or more (it comes from a ReLU).
        padded: the input was padded and filled by an operation before.
    """

    kind: Literal["conv", "max", "avg"] = "conv"
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Box = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    ceil: bool = False
    include_pad: bool = True
    positive: bool = False
    padded: bool = False

    @cached_property
    def span(self) -> Pair:
        """Positions from the first to the last that a window reads."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))  # type: ignore[return-value]

    @cached_property
    def rounds(self) -> int:
        """One ring less than the window is wide."""
        return max(self.span) - 1 if self.kind == "conv" and not self.padded else 0

    def average(self, values: Tensor) -> Tensor:
        """The average pooling of a map of floats, by the operation's own arithmetic."""
        pads = (self.padding[0], self.padding[2])
        return F.avg_pool2d(values, self.kernel, self.stride, pads, self.ceil, self.include_pad)

    def mask(self, masks: Sequence[Tensor]) -> Tensor:
        """Known where the window holds one visible position."""
        mask = masks[0]
        if self.kind == "avg":
            return self.average(mask.float()) > 0
        if self.ceil:
            pads = (self.padding[0], self.padding[2])
            return F.max_pool2d(mask.float(), self.kernel, self.stride, pads, self.dilation, True) > 0
        if self.span == (1, 1) and not any(self.padding):
            return mask if self.stride == (1, 1) else mask[..., :: self.stride[0], :: self.stride[1]].contiguous()
        mask = padded(mask, self.padding)
        if any(size < span for size, span in zip(size_of(mask), self.span, strict=True)):
            raise SkipError(
                f"the input is too small for {self.name} with a window of {self.span}: its activation is "
                f"{size_of(mask)} there; use larger images"
            )
        return windows(mask, self.kernel, self.stride, self.dilation)

    def reach(self, need: Tensor | None, mask: Tensor) -> Tensor:
        """Every position between the first and the last that a needed window reads."""
        if need is None:
            return torch.ones_like(mask)
        height, width = size_of(mask)
        (sy, sx), (ky, kx) = self.stride, self.span
        if (sy, sx) != (1, 1):
            spread = need.new_zeros(*need.shape[:2], (need.shape[2] - 1) * sy + 1, (need.shape[3] - 1) * sx + 1)
            spread[..., ::sy, ::sx] = need
        else:
            spread = need
        if (ky, kx) != (1, 1):
            spread = windows(padded(spread, (ky - 1, ky - 1, kx - 1, kx - 1)), (ky, kx))
        top, _, left, _ = self.padding
        bounds = (0, spread.shape[2], 0, spread.shape[3])
        return move(spread, bounds, (top, top + height, left, left + width))

    def region(self, box: Box) -> Box:
        """What it reads for an output box, in coordinates of the input; may reach outside of it."""
        (sy, sx), (ky, kx), (top, _, left, _) = self.stride, self.span, self.padding
        return (
            box[0] * sy - top,
            (box[1] - 1) * sy - top + ky,
            box[2] * sx - left,
            (box[3] - 1) * sx - left + kx,
        )


@dataclass(frozen=True)
class Pad(Op):
    """`F.pad` over positions: the input is filled first, so that the next window reads no hidden one.

    Attributes:
        amounts: left, right, top, bottom.
        mode: of `F.pad`.
        value: of the padding.
        widest: the model's widest window, which bounds the fill.
    """

    amounts: Box = (0, 0, 0, 0)
    mode: str = "constant"
    value: float = 0.0
    widest: int = 1

    @cached_property
    def rounds(self) -> int:
        """Enough for the model's widest window."""
        return self.widest - 1

    def mask(self, masks: Sequence[Tensor]) -> Tensor:
        """Padding with a constant is not known; a reflection is what it reflects."""
        if self.mode == "constant":
            return F.pad(masks[0], self.amounts)
        return F.pad(masks[0].float(), self.amounts, mode=self.mode) > 0

    def reach(self, need: Tensor | None, mask: Tensor) -> Tensor:
        """The positions that the needed part of the padded map comes from."""
        if need is None:
            return torch.ones_like(mask)
        if self.mode == "constant":
            left, _, top, _ = self.amounts
            height, width = size_of(mask)
            return move(need, whole(need), (top, top + height, left, left + width))
        with torch.enable_grad():
            leaf = torch.zeros(*need.shape[:2], *size_of(mask), device=need.device, requires_grad=True)
            (back,) = torch.autograd.grad(F.pad(leaf, self.amounts, mode=self.mode), leaf, need.float())
        return back > 0


@dataclass(frozen=True)
class Reduce(Op):
    """Positions to one number: the mean, sum, largest or norm over the visible ones; 0 without any."""

    how: Literal["mean", "sum", "max", "norm"] = "mean"

    def mask(self, masks: Sequence[Tensor]) -> None:
        """No positions are left."""


@dataclass(frozen=True)
class Adaptive(Op):
    """`adaptive_avg_pool2d` to more than one bin: the mean over the visible positions of a bin."""

    size: Pair = (1, 1)

    def mask(self, masks: Sequence[Tensor]) -> Tensor:
        """Known where a bin holds a visible position."""
        return F.adaptive_avg_pool2d(masks[0].float(), self.size) > 0


@dataclass(frozen=True)
class Flatten(Op):
    """Positions become features (`flatten`): hidden ones are 0."""

    def mask(self, masks: Sequence[Tensor]) -> None:
        """No positions are left."""
