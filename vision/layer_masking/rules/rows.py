"""Rules for rows: some images of a batch taken out or put back; each row keeps its mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from skipguide.errors import SkipError
from skipguide.vision.layer_masking.activation_info import info_at, number_of
from skipguide.vision.layer_masking.geometry import Pointwise
from skipguide.vision.layer_masking.masked_pass import MaskedPass
from skipguide.vision.layer_masking.rules.arguments import Arguments, axes_of
from skipguide.vision.layer_masking.rules.pointwise import pointwise


def getitem(
    masked: MaskedPass, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Tensor:
    """Some channels, or some rows; the masks' rows go with them."""
    x, index = args
    if not isinstance(x, Tensor) or not any(x is t for t in placed):
        raise SkipError(f"layer masking does not know {name} with an activation as index")
    info, number = info_at(x), number_of(x)
    index = index if isinstance(index, tuple) else (index,)
    if Ellipsis in [i for i in index if not isinstance(i, Tensor)]:
        place = next(n for n, i in enumerate(index) if i is Ellipsis)
        index = (*index[:place], *([slice(None)] * (x.ndim - len(index) + 1)), *index[place + 1 :])
    rest = [i for i in index[1:] if i != slice(None)] if len(index) > 1 else []
    first = index[0]
    for axis, i in enumerate(index):
        if axis - x.ndim in info.dims and i != slice(None):
            raise SkipError(f"layer masking does not know indices of positions; got {index}")
    if first == slice(None) if not isinstance(first, Tensor) else False:
        if any(i is None for i in index):
            raise SkipError(f"layer masking does not know new dimensions by index; got {index}")
        masked.record(Pointwise(name, (number,)))
        return masked.tag(func(*args, **kwargs), info, positive=info.positive)
    if rest or not isinstance(first, (Tensor, slice)):
        raise SkipError(f"layer masking knows rows by a tensor or a slice; got {index}")
    return _rows(masked, func, name, args, kwargs, x, first)


def _rows(
    masked: MaskedPass, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], x: Tensor, index: Any
) -> Tensor:
    info, mask = info_at(x), masked.mask(number_of(x))
    rows = mask if mask.shape[0] == 1 else mask[index]
    masked.record_rows(rows, f"{name} takes rows")
    return masked.tag(func(*args, **kwargs), info, positive=info.positive)


def index_select(
    masked: MaskedPass, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Tensor:
    """Rows, or channels."""
    given = dict(zip(("input", "dim", "index"), args, strict=False)) | dict(kwargs)
    x, axis = given["input"], axes_of(given["dim"], given["input"].ndim)[0]
    if axis in info_at(x).dims:
        raise SkipError(f"layer masking does not know {name} of positions")
    if axis != -x.ndim:
        return pointwise(masked, func, name, args, kwargs, [x])
    return _rows(masked, func, name, args, kwargs, x, given["index"])


def scatter(
    masked: MaskedPass, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Any:
    """Rows put into another activation: each row keeps the mask it came with."""
    if name in ("index_copy", "index_add"):
        given = dict(zip(("input", "dim", "index", "source"), args, strict=False)) | dict(kwargs)
        into, index = given["input"], given["index"]
        source: Any = given.get("source", given.get("tensor"))
        if given["dim"] not in (0, -into.ndim) or name == "index_add":
            raise SkipError(f"layer masking knows index_copy of rows; got {name} with dim={given['dim']}")
    else:
        into, index, source = args[:3]
        index = index[0] if isinstance(index, (list, tuple)) and len(index) == 1 else index
    if not isinstance(index, (Tensor, slice)) or len(placed) < 2:
        raise SkipError(f"layer masking knows {name} of rows of one activation into another; got index {index}")
    rows = into.shape[0]
    mask = masked.mask(number_of(into)).expand(rows, -1, -1, -1).clone()
    mask[index] = masked.mask(number_of(source)).expand(source.shape[0], -1, -1, -1)
    info = info_at(into)
    out = func(*args, **kwargs)
    masked.record_rows(mask, f"{name} puts rows")
    positive = info.positive and info_at(source).positive
    if out is None:  # `a[rows] = b`
        masked.tag(into, info, positive=positive)
        return None
    return masked.tag(out, info, positive=positive)


def split_rows(
    masked: MaskedPass, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], x: Tensor
) -> tuple[Tensor, ...]:
    """Stretches of rows."""
    info, mask, start = info_at(x), masked.mask(number_of(x)), 0
    parts: tuple[Tensor, ...] = func(*args, **kwargs)
    for part in parts:
        rows = slice(start, start + part.shape[0])
        masked.record_rows(mask if mask.shape[0] == 1 else mask[rows], f"{name} takes rows")
        masked.tag(part, info, positive=info.positive)
        start = rows.stop
    return parts


def join_rows(
    masked: MaskedPass, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Tensor:
    """Rows of several activations in one: each row keeps the mask it came with."""
    masks = [masked.mask(number_of(t)).expand(t.shape[0], -1, -1, -1) for t in placed]
    info = info_at(placed[0])
    masked.record_rows(torch.cat(masks), f"{name} joins rows")
    return masked.tag(func(*args, **kwargs), info, positive=all(info_at(t).positive for t in placed))


def choose(
    masked: MaskedPass, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Tensor:
    """`torch.where` with a decision per row: rows keep their masks; else the intersection."""
    if len(args) < 3:
        raise SkipError(f"layer masking knows {name} with a condition and two values")
    condition, a, b = args[:3]
    ones = isinstance(condition, Tensor) and condition.numel() == condition.shape[0] if condition.ndim else False
    if ones and len(placed) == 2 and isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim == condition.ndim:
        mine, other = masked.mask(number_of(a)), masked.mask(number_of(b))
        info = info_at(a)
        if mine is other:
            return pointwise(masked, func, name, args, kwargs, placed)
        masked.record_rows(torch.where(condition, mine, other), f"{name} chooses rows")
        return masked.tag(func(*args, **kwargs), info, positive=info.positive and info_at(b).positive)
    return pointwise(masked, func, name, args, kwargs, placed)
