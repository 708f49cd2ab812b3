"""Geometry: what an operation does to masks, forwards (what is known after it) and backwards (what it reads).

Masks are floats `[R, 1, H, W]` of 0 and 1, R = rows of the batch, or 1 for all of them. Nothing here looks at data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from skipguide.errors import SkipError
from skipguide.vision.layer_masking.fill import fill_weights, grow

Box = tuple[int, int, int, int]  # top, bottom, left, right
Pair = tuple[int, int]


def size_of(mask: Tensor) -> Pair:
    """Height and width."""
    return mask.shape[-2], mask.shape[-1]


def whole(mask: Tensor) -> Box:
    """The box of everything."""
    return 0, mask.shape[-2], 0, mask.shape[-1]


def both(a: Tensor, b: Tensor) -> Tensor:
    """Visible in both."""
    return a if a is b else a * b


def move(x: Tensor, source: Box, target: Box, value: float = 0.0) -> Tensor:
    """The values of `target` from a tensor that holds `source`; `value` where it holds none."""
    if source == target:
        return x
    if min(source[1], target[1]) <= max(source[0], target[0]) or min(source[3], target[3]) <= max(source[2], target[2]):
        return x.new_full((*x.shape[:-2], target[1] - target[0], target[3] - target[2]), value)  # nothing in common
    pads = (source[2] - target[2], target[3] - source[3], source[0] - target[0], target[1] - source[1])
    if max(pads) <= 0:
        top, left = -pads[2], -pads[0]
        return x[..., top : top + target[1] - target[0], left : left + target[3] - target[2]]
    return F.pad(x, pads, value=value)


@dataclass(frozen=True)
class Op:
    """One operation of the model on masked activations.

    Attributes:
        name: torch's name for it.
        inputs: numbers of the masked activations that it takes.
    """

    name: str
    inputs: tuple[int, ...]

    def mask(self, masks: Sequence[Tensor]) -> Tensor | None:
        """What is known after it; None if positions are gone."""
        known = masks[0]
        for other in masks[1:]:
            known = both(known, other)
        return known

    def reach(self, need: Tensor | None, mask: Tensor) -> Tensor:
        """The positions of its input that it reads for the needed outputs, hidden ones too."""
        return torch.ones_like(mask)

    @property
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

    @property
    def span(self) -> Pair:
        """Positions from the first to the last that a window reads."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))  # type: ignore[return-value]

    @property
    def rounds(self) -> int:
        """One ring less than the window is wide."""
        return max(self.span) - 1 if self.kind == "conv" and not self.padded else 0

    def pooled(self, mask: Tensor) -> Tensor:
        """The pooling of a mask, by the operation's own arithmetic."""
        if self.kind == "avg":
            pads = (self.padding[0], self.padding[2])
            return F.avg_pool2d(mask, self.kernel, self.stride, pads, self.ceil, self.include_pad)
        if self.kind == "max":
            pads = (self.padding[0], self.padding[2])
            return F.max_pool2d(mask, self.kernel, self.stride, pads, self.dilation, self.ceil)
        if self.span == (1, 1) and not any(self.padding):
            return mask if self.stride == (1, 1) else mask[..., :: self.stride[0], :: self.stride[1]]
        top, bottom, left, right = self.padding
        mask = F.pad(mask, (left, right, top, bottom)) if any(self.padding) else mask
        if any(size < span for size, span in zip(size_of(mask), self.span, strict=True)):
            raise SkipError(
                f"the input is too small for {self.name} with a window of {self.span}: its activation is "
                f"{size_of(mask)} there; use larger images"
            )
        return F.max_pool2d(mask, self.kernel, self.stride, 0, self.dilation)

    def mask(self, masks: Sequence[Tensor]) -> Tensor:
        """Known where the window holds one visible position."""
        pooled = self.pooled(masks[0])
        return (pooled > 0).to(pooled.dtype) if self.kind == "avg" else pooled

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
            spread = F.max_pool2d(F.pad(spread, (kx - 1, kx - 1, ky - 1, ky - 1)), (ky, kx), 1)
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

    @property
    def rounds(self) -> int:
        """Enough for the model's widest window."""
        return self.widest - 1

    def mask(self, masks: Sequence[Tensor]) -> Tensor:
        """Padding with a constant is not known; a reflection is what it reflects."""
        return F.pad(masks[0], self.amounts, mode=self.mode)

    def reach(self, need: Tensor | None, mask: Tensor) -> Tensor:
        """The transpose of the padding."""
        if need is None:
            return torch.ones_like(mask)
        if self.mode == "constant":
            left, _, top, _ = self.amounts
            height, width = size_of(mask)
            return move(need, whole(need), (top, top + height, left, left + width))
        with torch.enable_grad():
            leaf = need.new_zeros(*need.shape[:2], *size_of(mask)).requires_grad_()
            padded = F.pad(leaf, self.amounts, mode=self.mode)
            (back,) = torch.autograd.grad(padded, leaf, need)
        return (back > 0).to(need.dtype)


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
        return (F.adaptive_avg_pool2d(masks[0], self.size) > 0).to(masks[0].dtype)


@dataclass(frozen=True)
class Leave(Op):
    """Positions become features (`flatten`): hidden ones are 0."""

    def mask(self, masks: Sequence[Tensor]) -> None:
        """No positions are left."""


@dataclass
class Morphology:
    """Remembers what was computed from a mask: blocks of a stage share theirs."""

    memo: dict[tuple[object, ...], Tensor | None] = field(default_factory=dict)
    wider: set[tuple[int, int]] = field(default_factory=set)
    lists: dict[tuple[object, ...], list[Tensor]] = field(default_factory=dict)
    kept: list[object] = field(default_factory=list)

    def mask(self, op: Op, masks: Sequence[Tensor]) -> Tensor | None:
        """`op.mask`, once for equal questions."""
        ids = tuple(dict.fromkeys(id(mask) for mask in masks))
        if len(ids) > 1:  # a mask that another is contained in does not change their intersection
            masks = [m for m in masks if not any(other != id(m) and (other, id(m)) in self.wider for other in ids)]
            masks = list({id(m): m for m in masks}.values())
        if isinstance(op, Pointwise) and len({id(m) for m in masks}) == 1:
            return masks[0]
        key = (*(id(m) for m in masks), _shape(op))
        if key not in self.memo:
            self.memo[key] = after = op.mask(masks)
            self.kept += [*masks, after]
            if isinstance(op, Window) and after is not None and op.stride == (1, 1):
                top, _, left, _ = op.padding
                ky, kx = op.span
                # every window holds its own position, so the mask only grows
                if (
                    after.shape[-2:] == masks[0].shape[-2:]
                    and 0 <= top < ky
                    and 0 <= left < kx
                    and op.dilation == (1, 1)
                ):
                    self.wider |= {(id(masks[0]), id(after))}
                    self.wider |= {(a, id(after)) for a, b in self.wider if b == id(masks[0])}
            if isinstance(op, Pointwise) and after is not None:
                self.wider |= {(id(after), id(m)) for m in masks}
        return self.memo[key]

    def rings(self, mask: Tensor, rounds: int) -> list[Tensor]:
        """The mask after 0, 1, ... `rounds` rounds of fill."""
        have = self.lists.setdefault(("rings", id(mask)), [mask])
        while len(have) <= rounds:
            have.append(grow(have[-1]))
        return have[: rounds + 1]

    def weights(self, mask: Tensor, rounds: int, region: Box, dtype: torch.dtype) -> list[Tensor]:
        """The fill's weights on a region, 0 outside of the map."""
        key = ("weights", id(mask), rounds, region, dtype)
        if key not in self.lists:
            base = self.lists.get(("weights", id(mask)), [])
            if len(base) < rounds:
                base = self.lists["weights", id(mask)] = fill_weights(mask, rounds)
            self.lists[key] = [move(w, whole(mask), region).to(dtype).contiguous() for w in base[:rounds]]
            self.kept.append(mask)
        return self.lists[key]

    def part(self, mask: Tensor, region: Box, dtype: torch.dtype) -> Tensor:
        """The mask on a region, 0 outside of the map."""
        key = ("part", id(mask), region, dtype)
        if key not in self.lists:
            self.lists[key] = [move(mask, whole(mask), region).to(dtype).contiguous()]
            self.kept.append(mask)
        return self.lists[key][0]


def _shape(op: Op) -> tuple[object, ...]:
    """What of an operation matters to masks: everything but who it takes."""
    left_out = ("inputs", "name", "positive", "padded")
    return (type(op), *(value for name, value in vars(op).items() if name not in left_out))
