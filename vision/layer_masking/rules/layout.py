"""Layout: other orders of dimensions, groups of channels, positions that become features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from skipguide.errors import SkipError
from skipguide.vision.layer_masking.geometry import Leave, Pointwise
from skipguide.vision.layer_masking.rules.arguments import Arguments, argument, axes_of
from skipguide.vision.layer_masking.rules.pointwise import pointwise
from skipguide.vision.layer_masking.rules.rows import join_rows, split_rows
from skipguide.vision.layer_masking.spot import cast, laid, number_of, spot_at, spot_of

if TYPE_CHECKING:
    from skipguide.vision.layer_masking.run import MaskedRun


def permute(
    run: MaskedRun, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Tensor:
    """Another order of the dimensions."""
    x = args[0] if args else kwargs["input"]
    spot = spot_at(x)
    order = list(range(x.ndim))
    if name == "permute":
        dims = kwargs.get("dims", args[1:])
        dims = dims[0] if len(dims) == 1 and isinstance(dims[0], (list, tuple)) else dims
        order = [d % x.ndim for d in dims]
    else:
        a, b = (d % x.ndim for d in (argument(args, 1, kwargs.get("dim0")), argument(args, 2, kwargs.get("dim1"))))
        order[a], order[b] = order[b], order[a]
    placed_at = tuple(order.index(d % x.ndim) - x.ndim for d in spot.dims)
    if placed_at[0] + 1 != placed_at[1]:
        raise SkipError(f"layer masking needs height and width side by side, in this order; got {name} to {order}")
    run.emit(Pointwise(name, (number_of(x),)))
    return run.tag(func(*args, **kwargs), spot, dims=placed_at, positive=spot.positive)


def layer_norm(
    run: MaskedRun, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Tensor:
    """Norms and linear maps over the last dimension, which has to be the channels."""
    x = args[0] if args else kwargs["input"]
    shape = kwargs.get("normalized_shape", argument(args, 1, (1,))) if "norm" in name else (1,)
    if -1 in spot_at(x).dims or (not isinstance(shape, int) and len(shape) != 1):
        raise SkipError(f"layer masking knows {name} over channels only; got activations {tuple(x.shape)}")
    return pointwise(run, func, name, args, kwargs, placed)


def cat(
    run: MaskedRun, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Tensor:
    """Side by side in channels: visible where all of them are. One after the other as rows: each keeps its mask."""
    values: Sequence[Tensor] = kwargs.get("tensors", argument(args, 0))
    dim = kwargs.get("dim", kwargs.get("axis", argument(args, 1, 0)))
    axis = axes_of(dim, values[0].ndim)[0]
    spot = spot_at(placed[0])
    if axis == -values[0].ndim and len(placed) == len(values):
        return join_rows(run, func, name, args, kwargs, placed)
    if axis in spot.dims or axis == -values[0].ndim:
        raise SkipError(f"layer masking knows {name} of channels; got dim={dim}")
    out: Tensor = pointwise(run, func, name, args, kwargs, placed)
    spot_at(out).positive = len(placed) == len(values) and all(spot_at(t).positive for t in placed)
    return out


def split(
    run: MaskedRun, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Any:
    """Groups of channels, or of rows."""
    x = args[0] if args else kwargs.get("input", kwargs.get("tensor"))
    spot = spot_at(x)
    axis = axes_of(kwargs.get("dim", argument(args, 2, 0)), x.ndim)[0]
    if axis in spot.dims:
        raise SkipError(f"layer masking knows {name} of channels and of rows; got dimension {axis}")
    if axis == -x.ndim:
        return split_rows(run, func, name, args, kwargs, x)
    run.emit(Pointwise(name, (number_of(x),)))
    parts = func(*args, **kwargs)
    for part in parts:
        run.tag(part, spot, positive=spot.positive)
    return parts


def reshape(
    run: MaskedRun, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Tensor:
    """Another shape: with the positions kept (channel groups), or with all of them made features."""
    x = args[0] if args else kwargs["input"]
    spot, number = spot_at(x), number_of(x)
    mask = run.mask(number)
    run.fixed = run.fixed or f"{name} of positions"
    op_leave = Leave(name, (number,))
    plain = func(*args, **kwargs)
    if plain.shape == x.shape:
        run.emit(Pointwise(name, (number,)))
        return run.tag(plain, spot, positive=spot.positive)
    if spot.dims == (-2, -1) and plain.ndim >= 3 and plain.shape[-2:] == x.shape[-2:] == mask.shape[-2:]:
        run.emit(Pointwise(name, (number,)))
        return run.tag(plain, spot, positive=spot.positive)
    if plain.ndim == 2 and plain.shape[0] == x.shape[0]:
        action = run.emit(op_leave)
        if action.part is not None:
            x = x * cast(laid(action.part, spot.dims, x.ndim), x)
        return run.tag(func(x, *args[1:], **{k: v for k, v in kwargs.items() if k != "input"}), spot)
    raise SkipError(f"layer masking does not know {name} of {tuple(x.shape)} to {tuple(plain.shape)}")


def expand_as(
    run: MaskedRun, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Any:
    """A pooled value for every position: it is left as it is, since what follows broadcasts."""
    x, other = args[0], args[1] if len(args) > 1 else kwargs["other"]
    mine = spot_of(x)
    if mine is not None and mine.number is not None:
        if x.shape[-2:] != other.shape[-2:]:
            raise SkipError(f"layer masking does not know {name} of {tuple(x.shape)} to {tuple(other.shape)}")
        return x
    return x
