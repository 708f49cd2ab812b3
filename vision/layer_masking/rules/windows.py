"""Rules for convolutions, poolings and paddings, which read the filled activation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skipguide.errors import SkipError
from skipguide.vision.layer_masking.action import Action
from skipguide.vision.layer_masking.activation_info import cast_like, number_of
from skipguide.vision.layer_masking.fill import fill, fill_frame, fill_then, fills_in_parts
from skipguide.vision.layer_masking.geometry import Pad, Pointwise, Window
from skipguide.vision.layer_masking.masked_pass import MaskedPass
from skipguide.vision.layer_masking.masks import Box, meet, move
from skipguide.vision.layer_masking.rules.arguments import Arguments, Rule, map_at, pair_of

Channels = Callable[[Tensor, slice], Tensor]


def conv2d(
    masked: MaskedPass, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Tensor:
    """A convolution: of the filled activation."""
    given = dict(
        zip(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), args, strict=False)
    ) | dict(kwargs)
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    info = map_at(x, name)
    stride, dilation = pair_of(given.get("stride", 1)), pair_of(given.get("dilation", 1))
    kernel = (weight.shape[-2], weight.shape[-1])
    padding = given.get("padding", 0)
    if padding == "same":
        total = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
        pads = (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
    else:
        vertical, horizontal = (0, 0) if padding == "valid" else pair_of(padding)
        pads = (vertical, vertical, horizontal, horizontal)
    op = Window(name, (number_of(x),), "conv", kernel, stride, pads, dilation, padded=info.padded)
    if info.padded and max(op.span) > masked.widest:  # the padding filled for the model's own windows
        raise SkipError(
            f"layer masking does not know {name} over {op.span} positions after a padding of its own: expected at most "
            f"{masked.widest}, the widest that the model's weights and their modules' `dilation` say"
        )
    action = masked.record(op)
    groups = given.get("groups", 1)
    source = masked.boxes[op.inputs[0]]
    assert source is not None
    late = None if action.scale is None else bias  # a partial convolution scales the sum, not the bias
    first = bias if late is None else None

    def channelwise(v: Tensor, some: slice, pads: Any) -> Tensor:
        return func(v, weight[some], None if first is None else first[some], stride, pads, dilation, v.shape[1])

    depthwise = groups == x.shape[1] == weight.shape[0] and fills_in_parts(x, weight, first)
    out = run_window(
        op, action, x, source,
        lambda v: func(v, weight, first, stride, padding, dilation, groups),
        lambda v: func(v, weight, first, stride, 0, dilation, groups),
        (lambda v, some: channelwise(v, some, padding), lambda v, some: channelwise(v, some, 0)) if depthwise else None,
    )  # fmt: skip
    return masked.tag(out if late is None else out + late.view(-1, 1, 1), info)


def pooling(kind: str) -> Rule:
    """The maximum or the average of what is visible in a window."""
    names = {
        "max": ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
        "avg": ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    }[kind]

    def rule(
        masked: MaskedPass, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
    ) -> Tensor:
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        x = given.pop("input")
        info = map_at(x, name)
        if given.get("return_indices") or given.get("divisor_override"):
            raise SkipError(f"layer masking does not know {name} with return_indices or divisor_override")
        if info.padded and kind == "avg":
            raise SkipError(f"layer masking does not know {name} after a padding of its own")
        kernel = pair_of(given["kernel_size"])
        stride = pair_of(given["stride"]) if given.get("stride") else kernel
        vertical, horizontal = pair_of(given.get("padding", 0))
        op = Window(
            name, (number_of(x),), "max" if kind == "max" else "avg", kernel, stride,
            (vertical, vertical, horizontal, horizontal), pair_of(given.get("dilation", 1)),
            bool(given.get("ceil_mode", False)), bool(given.get("count_include_pad", True)), info.positive,
        )  # fmt: skip
        action = masked.record(op)
        source = masked.boxes[op.inputs[0]]
        assert source is not None
        if kind == "max":
            bare: Callable[[Tensor], Tensor] = lambda v: F.max_pool2d(v, kernel, stride, 0, op.dilation)  # noqa: E731
        else:
            bare = lambda v: F.avg_pool2d(v, kernel, stride)  # noqa: E731
        out = run_window(op, action, x, source, lambda v: func(v, **given), bare)
        return masked.tag(out, info, positive=info.positive)

    return rule


def pad(
    masked: MaskedPass, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Tensor:
    """`F.pad` of the last two dimensions."""
    given = dict(zip(("input", "pad", "mode", "value"), args, strict=False)) | dict(kwargs)
    x, mode = given["input"], given.get("mode", "constant")
    info = map_at(x, name)
    amounts = tuple(int(a) for a in given["pad"])
    if len(amounts) != 4 or mode not in ("constant", "reflect", "replicate", "circular") or min(amounts) < 0:
        raise SkipError(f"layer masking does not know {name} of {amounts} in mode {mode!r}")
    if not any(amounts):
        masked.record(Pointwise(name, (number_of(x),)))  # which leaves the padding before it as it is
        return masked.tag(func(*args, **kwargs), info, positive=info.positive, padded=info.padded)
    value = given.get("value")
    op = Pad(name, (number_of(x),), amounts, mode, float(value or 0.0), masked.widest)
    action = masked.record(op)
    source = masked.boxes[op.inputs[0]]
    assert source is not None
    return masked.tag(run_pad(op, action, x, source), info, positive=info.positive, padded=True)


def run_window(
    op: Window,
    action: Action,
    x: Tensor,
    source: Box,
    plain: Callable[[Tensor], Tensor],
    bare: Callable[[Tensor], Tensor],
    channelwise: tuple[Channels, Channels] | None = None,
) -> Tensor:
    """A convolution or pooling: `plain` with the model's own padding, `bare` without any.

    `channelwise` is the same for some channels at a time, where they do not mix.
    """
    region, work = action.region, action.work
    assert work is not None
    # in a maximum, hidden positions are the lowest number
    low = torch.finfo(x.dtype).min if op.kind == "max" and not op.positive else 0.0
    if action.part is None:
        out = plain(x) if region is None else bare(move(x, source, region, low))
        if low != 0 and region is not None and meet(region, source) != region:
            # a window whose value is not needed may see nothing but `low`, of which a convolution would make infinity
            out = out.masked_fill(out == low, 0.0)
    elif action.frame is not None:
        assert region is not None
        seen = action.frame
        over = (seen[0] - work[0], work[1] - seen[1], seen[2] - work[2], work[3] - seen[3])
        x = move(x, source, seen)
        if action.weights:
            x, seen = fill_frame(x, over, [cast_like(w, x) for w in action.weights]), work
        out = bare(move(x, seen, region, low))
    else:
        x = move(x, source, work)
        part = cast_like(action.part, x)
        weights = [cast_like(w, x) for w in action.weights]
        if channelwise is not None and low == 0 and weights:
            one, other = channelwise
            out = fill_then(
                x, weights, part,
                lambda v, some: one(v, some) if region is None else other(move(v, work, region), some),
            )  # fmt: skip
        else:
            x = fill(x, weights, part) if low == 0 else fill(x.masked_fill(part == 0, low), weights)
            out = plain(x) if region is None else bare(move(x, work, region))
    if action.scale is not None:
        out = out * cast_like(action.scale, out)
    if action.after is not None:
        out = out.masked_fill(action.after == 0, 0.0)
    return out


def run_pad(op: Pad, action: Action, x: Tensor, source: Box) -> Tensor:
    """`F.pad` of the filled activation."""
    work = action.work
    assert work is not None
    x = move(x, source, work)
    if action.part is not None:
        x = fill(x, [cast_like(w, x) for w in action.weights], cast_like(action.part, x))
    if action.region is not None:
        return move(x, work, action.region, op.value)
    padded = F.pad(x, op.amounts, mode=op.mode, **({"value": op.value} if op.mode == "constant" else {}))
    return move(padded, (0, padded.shape[-2], 0, padded.shape[-1]), action.box)
