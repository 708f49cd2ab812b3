"""Bool masks `[R, 1, H, W]`: what windows see of them, and boxes cut out of them.

On a CPU a pooling vectorises over channels and is slow for a mask's one; shifted ORs of bytes take a fiftieth of it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

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
    return a if a is b else a & b


def padded(mask: Tensor, pads: Box) -> Tensor:
    """With hidden positions around: top, bottom, left, right."""
    top, bottom, left, right = pads
    return F.pad(mask, (left, right, top, bottom)) if any(pads) else mask


def windows(mask: Tensor, kernel: Pair, stride: Pair = (1, 1), dilation: Pair = (1, 1)) -> Tensor:
    """Which windows see a visible position; without padding, as a pooling would go over the mask.

    Example:
        >>> windows(torch.tensor([[[[True, False, False, False]]]]), (1, 2)).int()
        tensor([[[[1, 0, 0]]]], dtype=torch.int32)
    """
    if mask.is_cuda:  # one kernel instead of several
        return F.max_pool2d(mask.float(), kernel, stride, 0, dilation) > 0
    for axis, size, step, apart in zip((-2, -1), kernel, stride, dilation, strict=True):
        mask = _along(mask, axis, size, apart)
        if step > 1:
            mask = mask[..., ::step, :] if axis == -2 else mask[..., ::step]
    return mask.contiguous()


def _along(mask: Tensor, axis: int, size: int, apart: int) -> Tensor:
    """Windows along one axis: every step joins two, so that their width about doubles."""
    width = 1
    while width < size:
        step = min(width, size - width)
        length = mask.shape[axis] - step * apart
        mask = mask.narrow(axis, 0, length) | mask.narrow(axis, step * apart, length)
        width += step
    return mask


def grow(mask: Tensor, by: int = 1) -> Tensor:
    """The mask, wider on all sides."""
    return windows(padded(mask, (by, by, by, by)), (2 * by + 1, 2 * by + 1)) if by else mask


def span(line: Tensor) -> Pair:
    """First and one past the last of what is True on a line; one position if nothing is."""
    places = line.nonzero()
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 1)


def rectangle_of(mask: Tensor) -> Box | None:
    """The visible positions if they are one rectangle, the same in all rows; else None."""
    seen = mask.amax((0, 1))
    box = (*span(seen.amax(1)), *span(seen.amax(0)))
    return box if bool(mask[..., box[0] : box[1], box[2] : box[3]].all()) else None


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


def join(a: Box, b: Box) -> Box:
    """The smallest box that holds two."""
    return min(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), max(a[3], b[3])


def meet(a: Box, b: Box) -> Box:
    """What two boxes have in common."""
    return max(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), min(a[3], b[3])
