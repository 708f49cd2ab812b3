"""How one operation is run under given masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from skipguide.vision.layer_masking.geometry import Adaptive, Flatten, Op, Pad, Pointwise, Reduce, Window
from skipguide.vision.layer_masking.mask_cache import MaskCache
from skipguide.vision.layer_masking.masks import Box, join, meet, move, padded, whole


@dataclass
class Action:
    """How one operation is run.

    Attributes:
        box: of the output that is computed.
        region: of the input that is read, for an operation that runs without its own padding; None: run as it is.
        work: the region plus what its fill reads; None: the region.
        part: the mask there, if something hidden is read.
        weights: of the fill's rounds.
        frame: the visible positions, if they are a rectangle: all that is read, and only around them is filled.
        scale: for averages.
        after: the mask of the output, where hidden positions have to be set to 0.
    """

    box: Box
    region: Box | None = None
    work: Box | None = None
    part: Tensor | None = None
    weights: Sequence[Tensor] = ()
    frame: Box | None = None
    scale: Tensor | None = None
    after: Tensor | None = None


def prepare(
    op: Op,
    masks: Sequence[Tensor],
    after: Tensor | None,
    inputs: Sequence[Box | None],
    box: Box | None,
    rounds: int,
    dtype: torch.dtype,
    how: str,
    cache: MaskCache,
) -> Action:
    """How to run an operation; operations of one kind on the same masks share the answer.

    `rounds` is -1 for an operation that reads nothing hidden.
    """
    if isinstance(op, Pointwise):
        assert box is not None
        return Action(box)
    key = (op.kind_of, id(masks[0]), id(after), inputs[0], box, rounds, dtype, how)
    if key not in cache.actions:
        cache.actions[key] = _prepare_one(op, masks[0], after, inputs[0], box, rounds, dtype, how, cache)
        cache.kept += [masks[0], after]
    action: Action = cache.actions[key]
    return action


def _prepare_one(
    op: Op,
    mask: Tensor,
    after: Tensor | None,
    source: Box | None,
    box: Box | None,
    rounds: int,
    dtype: torch.dtype,
    how: str,
    cache: MaskCache,
) -> Action:
    assert source is not None
    if isinstance(op, Reduce | Flatten):
        action = Action(source)
        # where a `Flatten` occurs no activation is cut to a box, because every position becomes a feature of its own
        if rounds >= 0:
            action.part = cache.part(mask, source, dtype)
        if isinstance(op, Reduce) and op.how == "mean" and (rounds >= 0 or source != whole(mask)):
            area = (source[1] - source[0]) * (source[3] - source[2])
            action.scale = area / mask.sum((2, 3), keepdim=True).clamp_min(1)
        return action
    assert box is not None
    assert after is not None
    if isinstance(op, Adaptive):
        if rounds < 0:
            return Action(box)
        share = F.adaptive_avg_pool2d(mask.float(), op.size)
        scale = torch.where(share > 0, 1 / share.clamp_min(1e-12), 0.0)
        return Action(box, part=cache.part(mask, source, dtype), scale=scale.to(dtype))
    direct = source == whole(mask) and box == whole(after)
    work = whole(mask)
    region: Box | None = None
    if isinstance(op, Window) and not direct:
        region = work = op.region(box)
    elif isinstance(op, Pad) and not direct:
        region = _shifted(op, box) if op.mode == "constant" else None
        bounds = whole(mask)
        inside = bounds if region is None else meet(region, bounds)
        top, bottom, left, right = inside
        wide = (top - rounds + 1, bottom + rounds - 1, left - rounds + 1, right + rounds - 1)
        work = join(inside, join(source, meet(wide, bounds))) if rounds > 0 else join(inside, source)
    action = Action(box, region, work)
    convolves = isinstance(op, Window) and op.kind == "conv"
    # the partial convolution as published divides by its zero padding too, whatever is hidden
    if rounds < 0 and not (how == "partial" and convolves):
        if isinstance(op, Window) and op.kind == "avg" and not direct:
            action.scale = _average(op, mask, box, dtype, direct)
        return action
    if rounds > 0 and isinstance(op, Window) and region is not None:
        # a position at the region's edge is filled from outside of it: from visible ones, and from filled ones
        top, bottom, left, right = region
        wide = (top - rounds + 1, bottom + rounds - 1, left - rounds + 1, right + rounds - 1)
        work = join(region, join(source, meet(wide, whole(mask))))
    action.work = work
    if not filled_before(op):
        action.part = cache.part(mask, work, dtype)
        rectangle = cache.rectangle(mask) if isinstance(op, Window) and region is not None else None
        if rectangle is not None and meet(rectangle, source) == meet(rectangle, work) == rectangle:
            action.frame = rectangle
    if isinstance(op, Window) and op.kind == "avg":
        action.scale = _average(op, mask, box, dtype, direct)
    elif isinstance(op, Window) and op.kind == "max" and not op.positive:
        action.after = cache.part(after, box, dtype)
    elif how == "partial" and isinstance(op, Window) and convolves:
        ones = torch.full((1, 1, *op.kernel), 1 / (op.kernel[0] * op.kernel[1]), device=mask.device)
        share = F.conv2d(padded(mask, op.padding).float(), ones, None, op.stride, 0, op.dilation)
        scale = torch.where(share > 0, 1 / share.clamp_min(1e-12), 0.0)
        action.scale = cache.part(scale, box, dtype)
    elif how == "neighbours" and rounds > 0:
        action.weights = cache.weights(mask, rounds, work, dtype)
    return action


def _shifted(op: Pad, box: Box) -> Box:
    left, _, top, _ = op.amounts
    return box[0] - top, box[1] - top, box[2] - left, box[3] - left


def _average(op: Window, mask: Tensor, box: Box, dtype: torch.dtype, direct: bool) -> Tensor:
    """What the mean over the hidden-as-0 window is multiplied with, for the mean over the visible positions.

    A window without anything hidden keeps the operation's own divisor, so the image's border stays as it was trained.
    """
    plain = op.average(torch.ones_like(mask[:1], dtype=torch.float32))
    if direct:
        seen = op.average(mask.float())
        return torch.where(seen > 0, plain / seen.clamp_min(1e-12), 0.0).to(dtype).contiguous()
    # cut out of its input, the pooling divides by the whole window, whatever the operation's own divisor is
    pads = (op.padding[0], op.padding[2])
    count = F.avg_pool2d(mask.float(), op.kernel, op.stride, pads, op.ceil, True, divisor_override=1)
    scale = torch.where(count > 0, plain * (op.kernel[0] * op.kernel[1]) / count.clamp_min(0.5), 0.0)
    return move(scale, whole(scale), box).to(dtype).contiguous()


def filled_before(op: Op) -> bool:
    """Whether a convolution's input was filled when it was padded."""
    return isinstance(op, Window) and op.kind == "conv" and op.padded
