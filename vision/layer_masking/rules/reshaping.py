"""Rules that reshape: other orders of dimensions, groups of channels, positions that become features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from skipguide.errors import SkipError
from skipguide.vision.layer_masking.activation_info import cast_like, in_layout, info_at, info_of, number_of
from skipguide.vision.layer_masking.geometry import Flatten, Pointwise
from skipguide.vision.layer_masking.masked_pass import MaskedPass
from skipguide.vision.layer_masking.rules.arguments import Arguments, argument, axes_of
from skipguide.vision.layer_masking.rules.pointwise import pointwise
from skipguide.vision.layer_masking.rules.rows import join_rows, split_rows


def permute(
    masked: MaskedPass, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Tensor:
    """Another order of the dimensions."""
    x = args[0] if args else kwargs["input"]
    info = info_at(x)
    order = list(range(x.ndim))
    if name == "permute":
        dims = kwargs.get("dims", args[1:])
        dims = dims[0] if len(dims) == 1 and isinstance(dims[0], (list, tuple)) else dims
        order = [d % x.ndim for d in dims]
    else:
        a, b = (d % x.ndim for d in (argument(args, 1, kwargs.get("dim0")), argument(args, 2, kwargs.get("dim1"))))
        order[a], order[b] = order[b], order[a]
    placed_at = tuple(order.index(d % x.ndim) - x.ndim for d in info.dims)
    if placed_at[0] + 1 != placed_at[1]:
        raise SkipError(f"layer masking needs height and width side by side, in this order; got {name} to {order}")
    masked.record(Pointwise(name, (number_of(x),)))
    return masked.tag(func(*args, **kwargs), info, dims=placed_at, positive=info.positive)


def layer_norm(
    masked: MaskedPass, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Tensor:
    """Norms and linear maps over the last dimension, which has to be the channels."""
    x = args[0] if args else kwargs["input"]
    shape = kwargs.get("normalized_shape", argument(args, 1, (1,))) if "norm" in name else (1,)
    if -1 in info_at(x).dims or (not isinstance(shape, int) and len(shape) != 1):
        raise SkipError(f"layer masking knows {name} over channels only; got activations {tuple(x.shape)}")
    return pointwise(masked, func, name, args, kwargs, placed)


def cat(
    masked: MaskedPass, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Tensor:
    """Side by side in channels: visible where all of them are. One after the other as rows: each keeps its mask."""
    values: Sequence[Tensor] = kwargs.get("tensors", argument(args, 0))
    dim = kwargs.get("dim", kwargs.get("axis", argument(args, 1, 0)))
    axis = axes_of(dim, values[0].ndim)[0]
    info = info_at(placed[0])
    if axis == -values[0].ndim and len(placed) == len(values):
        return join_rows(masked, func, name, args, kwargs, placed)
    if axis in info.dims or axis == -values[0].ndim:
        raise SkipError(f"layer masking knows {name} of channels; got dim={dim}")
    out: Tensor = pointwise(masked, func, name, args, kwargs, placed)
    info_at(out).positive = len(placed) == len(values) and all(info_at(t).positive for t in placed)
    return out


def split(
    masked: MaskedPass, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Any:
    """Groups of channels, or of rows."""
    x = args[0] if args else kwargs.get("input", kwargs.get("tensor"))
    info = info_at(x)
    axis = axes_of(kwargs.get("dim", argument(args, 2, 0)), x.ndim)[0]
    if axis in info.dims:
        raise SkipError(f"layer masking knows {name} of channels and of rows; got dimension {axis}")
    if axis == -x.ndim:
        return split_rows(masked, func, name, args, kwargs, x)
    masked.record(Pointwise(name, (number_of(x),)))
    parts = func(*args, **kwargs)
    for part in parts:
        masked.tag(part, info, positive=info.positive)
    return parts


def reshape(
    masked: MaskedPass, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Tensor:
    """Another shape: with the positions kept (channel groups), or with all of them made features."""
    x = args[0] if args else kwargs["input"]
    info, number = info_at(x), number_of(x)
    mask = masked.mask(number)
    masked.fixed = masked.fixed or f"{name} of positions"
    plain = func(*args, **kwargs)
    if plain.shape == x.shape:
        masked.record(Pointwise(name, (number,)))
        return masked.tag(plain, info, positive=info.positive)
    if info.dims == (-2, -1) and plain.ndim >= 3 and plain.shape[-2:] == x.shape[-2:] == mask.shape[-2:]:
        masked.record(Pointwise(name, (number,)))
        return masked.tag(plain, info, positive=info.positive)
    if plain.ndim == 2 and plain.shape[0] == x.shape[0]:
        action = masked.record(Flatten(name, (number,)))
        if action.part is not None:
            x = x * cast_like(in_layout(action.part, info.dims, x.ndim), x)
        return masked.tag(func(x, *args[1:], **{k: v for k, v in kwargs.items() if k != "input"}), info)
    raise SkipError(f"layer masking does not know {name} of {tuple(x.shape)} to {tuple(plain.shape)}")


def expand_as(
    masked: MaskedPass, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Any:
    """A pooled value for every position: it stays as it is, because the operations that follow broadcast it."""
    x, other = args[0], args[1] if len(args) > 1 else kwargs["other"]
    info = info_of(x)
    if info is not None and info.number is not None and x.shape[-2:] != other.shape[-2:]:
        raise SkipError(f"layer masking does not know {name} of {tuple(x.shape)} to {tuple(other.shape)}")
    return x
