"""Rules for operations that read the same position of every operand, and for questions about shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from skipguide.arguments import sequence_like
from skipguide.errors import SkipError
from skipguide.vision.layer_masking.activation_info import TAG, ActivationInfo, info_at, info_of, number_of
from skipguide.vision.layer_masking.geometry import Pointwise
from skipguide.vision.layer_masking.masked_pass import MaskedPass
from skipguide.vision.layer_masking.masks import Box
from skipguide.vision.layer_masking.rules.arguments import Arguments
from skipguide.vision.layer_masking.rules.names import KEEPS_SIGN, NOT_NEGATIVE, OUT_OF_PLACE


def answer_question(masked: MaskedPass, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any]) -> Any:
    """Answer as for the whole activation, also where only a box of it was computed."""
    out = func(*args, **kwargs)
    x = args[0]
    if isinstance(out, Tensor):  # `.T`, `.data`, `.grad` and their like
        raise SkipError(f"layer masking cannot follow an attribute of a tensor {tuple(x.shape)} that is a tensor again")
    if isinstance(out, torch.Size) and len(out) == x.ndim:
        info, sizes = info_at(x), list(out)
        mask = masked.mask(number_of(x))
        sizes[info.dims[0]], sizes[info.dims[1]] = mask.shape[-2], mask.shape[-1]
        return torch.Size(sizes)
    if name == "size" and isinstance(out, int):
        return answer_question(masked, torch.Tensor.size, "size", (x,), {})[args[1] if len(args) > 1 else kwargs["dim"]]
    return out


def pointwise(
    masked: MaskedPass, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Tensor:
    """The same position of every operand."""
    first = info_at(placed[0])
    sizes = {tuple(masked.mask(number_of(t)).shape[-2:]) for t in placed}
    if len(sizes) > 1:
        raise SkipError(f"layer masking does not know {name!r} of activations with maps of sizes {sorted(sizes)}")
    if any(info_at(t).dims != first.dims for t in placed):
        raise SkipError(f"layer masking does not know {name!r} of activations in different layouts")
    op = Pointwise(name, tuple(number_of(t) for t in placed))
    action = masked.record(op)
    full: Any = sizes.pop()
    if any(masked.boxes[i] != action.box for i in op.inputs):
        into = _written(func, args)
        if into is not None:
            if name not in OUT_OF_PLACE:
                raise SkipError(f"layer masking does not know {name} in place; pass crop=False")
            func = OUT_OF_PLACE[name]
        args = tuple(_cut(masked, a, first, action.box, full) for a in args)
        kwargs = {k: _cut(masked, v, first, action.box, full) for k, v in kwargs.items()}
        out = func(*args, **kwargs)
        if into is not None:
            out = _rewritten(into, out)
        return masked.tag(out, first, positive=name in NOT_NEGATIVE)
    out = func(*args, **kwargs)
    positive = name in NOT_NEGATIVE or (name in KEEPS_SIGN and first.positive)
    return masked.tag(out, first, positive=positive, padded=first.padded and len(placed) == 1)


def _cut(masked: MaskedPass, value: Any, info: ActivationInfo, box: Box, full: tuple[int, int]) -> Any:
    """An operand on the box of the result: activations by their own box, constants with positions by the map."""
    if isinstance(value, (list, tuple)):
        return sequence_like(value, (_cut(masked, v, info, box, full) for v in value))
    if not isinstance(value, Tensor) or value.ndim < -min(info.dims):
        return value
    own = info_of(value)
    if own is not None and own.number is not None:
        source = masked.boxes[own.number]
        dims = own.dims
    else:
        source, dims = (0, full[0], 0, full[1]), info.dims
        if (value.shape[dims[0]], value.shape[dims[1]]) != full or full == (1, 1):
            return value
    assert source is not None
    if source == box:
        return value
    value = value.narrow(dims[0], box[0] - source[0], box[1] - box[0])
    return value.narrow(dims[1], box[2] - source[2], box[3] - box[2])


def _written(func: Any, args: Arguments) -> Tensor | None:
    """The operand that an operation writes into, if it does."""
    name: str = getattr(func, "__name__", "")
    in_place = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
    return args[0] if in_place and args and isinstance(args[0], Tensor) else None


def _rewritten(into: Tensor, value: Tensor) -> Tensor:
    """Let the operand hold the result, which is smaller.

    A model may go on with the operation's result or with its operand. Where autograd forbids to change the operand, it
    is no longer followed.
    """
    if torch.is_grad_enabled() and (into.requires_grad or value.requires_grad):
        delattr(into, TAG)
        return value
    return into.set_(value)  # type: ignore[call-overload]
