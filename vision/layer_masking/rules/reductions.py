"""Rules for reductions: positions to one number, or to a few bins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from skipguide.errors import SkipError
from skipguide.vision.layer_masking.activation_info import ActivationInfo, cast_like, in_layout, info_at, number_of
from skipguide.vision.layer_masking.geometry import Adaptive, Pointwise, Reduce
from skipguide.vision.layer_masking.masked_pass import MaskedPass
from skipguide.vision.layer_masking.rules.arguments import Arguments, Rule, argument, axes_of, map_at


def reduction(how: str) -> Rule:
    """The mean, sum, maximum or 2-norm over visible positions; over channels, what it is without masks."""

    def rule(
        masked: MaskedPass, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
    ) -> Any:
        x = args[0] if args else kwargs["input"]
        info = info_at(x)
        kwargs = dict(kwargs)
        if how == "norm":
            if name == "vector_norm" or "ord" in kwargs:
                p, dim = kwargs.get("ord", args[1] if len(args) > 1 else 2), kwargs.get("dim", argument(args, 2))
                keepdim = kwargs.get("keepdim", argument(args, 3, False))
            else:
                p, dim = kwargs.get("p", argument(args, 1, "fro")), kwargs.get("dim", argument(args, 2))
                keepdim = kwargs.get("keepdim", argument(args, 3, False))
            if p not in (2, 2.0, "fro", None):
                raise SkipError(f"layer masking knows the 2-norm over positions; got {name} with p={p}")
        else:
            dim = kwargs.get("dim", kwargs.get("axis", argument(args, 1)))
            keepdim = kwargs.get("keepdim", argument(args, 2, False))
        axes = axes_of(dim, x.ndim)
        if not set(axes) & set(info.dims):
            return _channels(masked, func, name, args, kwargs, x, info, axes, bool(keepdim))
        if not set(info.dims) <= set(axes) or x.ndim != 4 or -x.ndim in axes:
            raise SkipError(f"layer masking knows {name} over both position dimensions or none; got dim={dim}")
        op = Reduce(name, (number_of(x),), how)  # type: ignore[arg-type]
        action = masked.record(op)
        if how == "max":
            low = torch.finfo(x.dtype).min
            seen = x if action.part is None else x.masked_fill(in_layout(action.part, info.dims, 4) == 0, low)
            out = seen.amax(axes, keepdim=bool(keepdim))
            out = out.masked_fill(out == low, 0.0) if action.part is not None else out
        else:
            if action.part is not None:
                x = x * cast_like(in_layout(action.part, info.dims, 4), x)
            if how == "norm":
                out = torch.linalg.vector_norm(x, 2, axes, keepdim=bool(keepdim))
            elif action.scale is None:
                out = x.mean(axes, keepdim=bool(keepdim)) if how == "mean" else x.sum(axes, keepdim=bool(keepdim))
            else:
                out = _mean(x, axes, bool(keepdim), action.scale, info)
        masked.tag(out, info)
        return out

    return rule


def _mean(x: Tensor, axes: tuple[int, ...], keepdim: bool, scale: Tensor, info: ActivationInfo) -> Tensor:
    """The mean, times `scale` `[R, 1, 1, 1]`.

    Small types are summed in fp32, where few visible positions do not vanish among many.
    """
    low = x.dtype in (torch.float16, torch.bfloat16)
    mean = x.mean(axes, keepdim=True, dtype=torch.float32 if low else None)
    mean = (mean * scale.to(mean.dtype)).to(x.dtype)
    if keepdim:
        return mean
    for axis in axes:  # ascending negatives: the earlier ones keep their place from the end only if squeezed first
        mean = mean.squeeze(axis) if axis == axes[-1] else mean
    return mean.reshape([s for d, s in zip(range(-x.ndim, 0), x.shape, strict=True) if d not in axes])


def _channels(
    masked: MaskedPass,
    func: Any,
    name: str,
    args: Arguments,
    kwargs: Any,
    x: Tensor,
    info: ActivationInfo,
    axes: Any,
    keepdim: bool,
) -> Any:
    """A reduction over channels: positions stay."""
    if not keepdim and any(axis > min(info.dims) for axis in axes):
        raise SkipError(f"layer masking does not know {name} over channels after positions without keepdim")
    masked.record(Pointwise(name, (number_of(x),)))
    out = func(*args, **kwargs)
    if not isinstance(out, Tensor):
        raise SkipError(f"layer masking does not know {name} with indices")
    return masked.tag(out, info)


mean, amax = reduction("mean"), reduction("max")


def adaptive_avg_pool2d(
    masked: MaskedPass, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Tensor:
    """The mean over visible positions, of everything or per bin."""
    given = dict(zip(("input", "output_size"), args, strict=False)) | dict(kwargs)
    x, size = given["input"], given["output_size"]
    info = map_at(x, name)
    number = number_of(x)
    full = masked.mask(number).shape[-2:]
    pair = [size, size] if isinstance(size, int) or size is None else list(size)
    height, width = (int(f) if s is None else int(s) for s, f in zip(pair, full, strict=True))
    if (height, width) == (1, 1):
        return mean(masked, torch.mean, "mean", (x, (-2, -1), True), {}, placed)
    masked.fixed = masked.fixed or f"{name} to {height}x{width} bins"
    action = masked.record(Adaptive(name, (number,), (height, width)))
    out = func(x if action.part is None else x * cast_like(action.part, x), (height, width))
    return masked.tag(out if action.scale is None else out * cast_like(action.scale, out), info)


def adaptive_max_pool2d(
    masked: MaskedPass, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Any:
    """The largest of everything visible."""
    given = dict(zip(("input", "output_size", "return_indices"), args, strict=False)) | dict(kwargs)
    if given["output_size"] not in (1, (1, 1), [1, 1]) or given.get("return_indices"):
        raise SkipError(f"layer masking knows {name} to one value; got {given['output_size']}")
    return amax(masked, torch.amax, "amax", (given["input"], (-2, -1), True), {}, placed)
