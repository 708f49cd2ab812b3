"""Rules: which operations of torch are understood on masked activations, and what each becomes.

A table from names to functions. What is not in it is refused by name: an operation that mixes positions in a way
that is not understood would let hidden pixels through without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skipguide.errors import SkipError
from skipguide.vision.layer_masking.geometry import Adaptive, Leave, Pad, Pointwise, Reduce, Window
from skipguide.vision.layer_masking.masks import Box

if TYPE_CHECKING:
    from skipguide.vision.layer_masking.run import MaskedRun, Spot

Arguments = tuple[Any, ...]
Rule = Callable[["MaskedRun", Callable[..., Any], str, Arguments, Mapping[str, Any], list[Tensor]], Any]

UNARY = frozenset(
    [
        "relu",
        "relu6",
        "hardtanh",
        "silu",
        "hardswish",
        "hardsigmoid",
        "sigmoid",
        "gelu",
        "elu",
        "selu",
        "celu",
        "leaky_relu",
        "prelu",
        "mish",
        "tanh",
        "softplus",
        "softsign",
        "abs",
        "neg",
        "exp",
        "log",
        "sqrt",
        "rsqrt",
        "square",
        "reciprocal",
        "clamp",
        "clip",
        "clamp_min",
        "dropout",
        "alpha_dropout",
        "feature_dropout",
        "dropout2d",
        "contiguous",
        "clone",
        "detach",
        "alias",
        "requires_grad",
        "float",
        "half",
        "bfloat16",
        "double",
        "to",
        "type",
        "type_as",
        "cpu",
        "cuda",
        "batch_norm",
        "stochastic_depth",
        "drop_path",
        "threshold",
        "erf",
        "nan_to_num",
        "view_as_same",
    ]
)
BINARY = frozenset(
    [
        "add",
        "radd",
        "iadd",
        "sub",
        "rsub",
        "isub",
        "mul",
        "rmul",
        "imul",
        "div",
        "rdiv",
        "truediv",
        "rtruediv",
        "itruediv",
        "true_divide",
        "pow",
        "ipow",
        "rpow",
        "addcmul",
        "maximum",
        "minimum",
        "lerp",
        "multiply",
        "subtract",
    ]
)
FREE = frozenset(
    [
        "get",
        "size",
        "dim",
        "ndimension",
        "is_floating_point",
        "numel",
        "is_contiguous",
        "stride",
        "len",
        "get_device",
        "element_size",
        "is_complex",
        "data_ptr",
        "storage_offset",
        "type_of",
        "hash",
        "repr",
        "format",
        "set",
        "is_inference",
    ]
)
OUT_OF_PLACE = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "pow": torch.pow}
OUT_OF_PLACE |= {f"i{name}": function for name, function in OUT_OF_PLACE.items()} | {"itruediv": torch.div}
NOT_NEGATIVE = frozenset(("relu", "relu6", "sigmoid", "hardsigmoid"))
STAYS = frozenset(("dropout", "contiguous", "clone", "to", "float", "half", "bfloat16", "double", "type", "detach"))


def apply_rule(
    run: MaskedRun, func: Callable[..., Any], args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Any:
    """Do one operation on masked activations.

    Raises:
        SkipError: for one that is not understood, named.
    """
    from skipguide.vision.layer_masking.run import name_of, spot_of, where

    name = name_of(func)
    if name in FREE:
        return _question(run, func, name, args, kwargs)
    rule = RULES.get(name)
    if rule is None:
        shapes = ", ".join(str(tuple(t.shape)) for t in placed)
        raise SkipError(
            f"layer masking does not know the operation {name!r}{where(run)} on activations {shapes}: it may mix "
            f"hidden and visible positions. Known: convolutions, pools, norms per position, adds, cat; see "
            f"skipguide.vision.layer_masking.rules"
        )
    if any(spot_of(t) is None for t in placed):  # pragma: no cover - the caller looked
        raise AssertionError
    return rule(run, func, name, args, kwargs, placed)


def _spot(tensor: Tensor) -> Spot:
    from skipguide.vision.layer_masking.run import TAG

    spot: Spot = getattr(tensor, TAG)
    return spot


def _number(tensor: Tensor) -> int:
    number = _spot(tensor).number
    assert number is not None
    return number


def _question(run: MaskedRun, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any]) -> Any:
    """Shape and type: the whole activation's, also where only a box of it was computed."""
    out = func(*args, **kwargs)
    x = args[0]
    if isinstance(out, Tensor):  # `.T`, `.data`, `.grad` and their like
        raise SkipError(f"layer masking cannot follow an attribute of a tensor {tuple(x.shape)} that is a tensor again")
    if isinstance(out, torch.Size) and len(out) == x.ndim:
        spot, sizes = _spot(x), list(out)
        mask = run.mask(_number(x))
        sizes[spot.dims[0]], sizes[spot.dims[1]] = mask.shape[-2], mask.shape[-1]
        return torch.Size(sizes)
    if name == "size" and isinstance(out, int):
        return _question(run, torch.Tensor.size, "size", (x,), {})[args[1] if len(args) > 1 else kwargs["dim"]]
    return out


def _cut(run: MaskedRun, value: Any, spot: Spot, box: Box, full: tuple[int, int]) -> Any:
    """An operand on the box of the result: activations by their own box, constants with positions by the map."""
    if isinstance(value, (list, tuple)):
        return type(value)(_cut(run, v, spot, box, full) for v in value)
    if not isinstance(value, Tensor) or value.ndim < -min(spot.dims):
        return value
    from skipguide.vision.layer_masking.run import spot_of

    own = spot_of(value)
    if own is not None and own.number is not None:
        source = run.boxes[own.number]
        dims = own.dims
    else:
        source, dims = (0, full[0], 0, full[1]), spot.dims
        if (value.shape[dims[0]], value.shape[dims[1]]) != full or full == (1, 1):
            return value
    assert source is not None
    if source == box:
        return value
    value = value.narrow(dims[0], box[0] - source[0], box[1] - box[0])
    return value.narrow(dims[1], box[2] - source[2], box[3] - box[2])


def pointwise(
    run: MaskedRun, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Tensor:
    """The same position of every operand."""
    first = _spot(placed[0])
    sizes = {tuple(run.mask(_number(t)).shape[-2:]) for t in placed}
    if len(sizes) > 1:
        raise SkipError(f"layer masking does not know {name!r} of activations with maps of sizes {sorted(sizes)}")
    if any(_spot(t).dims != first.dims for t in placed):
        raise SkipError(f"layer masking does not know {name!r} of activations in different layouts")
    op = Pointwise(name, tuple(_number(t) for t in placed))
    action = run.emit(op)
    full: Any = sizes.pop()
    if any(run.boxes[i] != action.box for i in op.inputs):
        into = _written(func, args)
        if into is not None:
            if name not in OUT_OF_PLACE:
                raise SkipError(f"layer masking does not know {name} in place; pass crop=False")
            func = OUT_OF_PLACE[name]
        args = tuple(_cut(run, a, first, action.box, full) for a in args)
        kwargs = {k: _cut(run, v, first, action.box, full) for k, v in kwargs.items()}
        out = func(*args, **kwargs)
        if into is not None:
            out = _rewritten(into, out)
        return run.tag(out, first, positive=name in NOT_NEGATIVE)
    out = func(*args, **kwargs)
    positive = name in NOT_NEGATIVE or (name in STAYS and first.positive)
    return run.tag(out, first, positive=positive, padded=first.padded and len(placed) == 1)


def _written(func: Any, args: Arguments) -> Tensor | None:
    """The operand that an operation writes into, if it does."""
    name: str = getattr(func, "__name__", "")
    in_place = name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
    return args[0] if in_place and args and isinstance(args[0], Tensor) else None


def _rewritten(into: Tensor, value: Tensor) -> Tensor:
    """Let the operand hold the result, which is smaller.

    Most models go on with what the operation returned, but they may as well go on with the operand. Where autograd
    forbids it, the operand is no longer followed.
    """
    from skipguide.vision.layer_masking.run import TAG

    if torch.is_grad_enabled() and (into.requires_grad or value.requires_grad):
        delattr(into, TAG)
        return value
    return into.set_(value)  # type: ignore[call-overload]


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, (list, tuple)):
        return (int(value[0]), int(value[-1]))
    return int(value), int(value)


def conv2d(
    run: MaskedRun, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Tensor:
    """A convolution: of the filled activation."""
    from skipguide.vision.layer_masking.run import run_window

    given = dict(
        zip(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), args, strict=False)
    ) | dict(kwargs)
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    spot = _map(x, name)
    stride, dilation = _pair(given.get("stride", 1)), _pair(given.get("dilation", 1))
    kernel = (weight.shape[-2], weight.shape[-1])
    padding = given.get("padding", 0)
    if padding == "same":
        total = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
        pads = (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
    else:
        vertical, horizontal = (0, 0) if padding == "valid" else _pair(padding)
        pads = (vertical, vertical, horizontal, horizontal)
    op = Window(name, (_number(x),), "conv", kernel, stride, pads, dilation, padded=spot.padded)
    action = run.emit(op)
    groups = given.get("groups", 1)
    source = run.boxes[op.inputs[0]]
    assert source is not None
    out = run_window(
        op, action, x, source,
        lambda v: func(v, weight, bias, stride, padding, dilation, groups),
        lambda v: func(v, weight, bias, stride, 0, dilation, groups),
    )  # fmt: skip
    return run.tag(out, spot)


def _map(x: Any, name: str) -> Spot:
    if not isinstance(x, Tensor) or x.ndim != 4 or _spot(x).number is None or _spot(x).dims != (-2, -1):
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise SkipError(f"layer masking knows {name} of activations [N, C, H, W]; got {shape}")
    return _spot(x)


def _pool(kind: str) -> Rule:
    names = {
        "max": ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
        "avg": ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    }[kind]

    def rule(
        run: MaskedRun, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
    ) -> Tensor:
        from skipguide.vision.layer_masking.run import run_window

        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        x = given.pop("input")
        spot = _map(x, name)
        if given.get("return_indices") or given.get("divisor_override"):
            raise SkipError(f"layer masking does not know {name} with return_indices or divisor_override")
        if spot.padded and kind == "avg":
            raise SkipError(f"layer masking does not know {name} after a padding of its own")
        kernel = _pair(given["kernel_size"])
        stride = _pair(given["stride"]) if given.get("stride") else kernel
        vertical, horizontal = _pair(given.get("padding", 0))
        op = Window(
            name, (_number(x),), "max" if kind == "max" else "avg", kernel, stride,
            (vertical, vertical, horizontal, horizontal), _pair(given.get("dilation", 1)),
            bool(given.get("ceil_mode", False)), bool(given.get("count_include_pad", True)), spot.positive,
        )  # fmt: skip
        action = run.emit(op)
        source = run.boxes[op.inputs[0]]
        assert source is not None
        if kind == "max":
            bare: Callable[[Tensor], Tensor] = lambda v: F.max_pool2d(v, kernel, stride, 0, op.dilation)  # noqa: E731
        else:
            bare = lambda v: F.avg_pool2d(v, kernel, stride)  # noqa: E731
        out = run_window(op, action, x, source, lambda v: func(v, **given), bare)
        return run.tag(out, spot, positive=spot.positive)

    return rule


def pad(
    run: MaskedRun, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Tensor:
    """`F.pad` of the last two dimensions."""
    from skipguide.vision.layer_masking.run import run_pad

    given = dict(zip(("input", "pad", "mode", "value"), args, strict=False)) | dict(kwargs)
    x, mode = given["input"], given.get("mode", "constant")
    spot = _map(x, name)
    amounts = tuple(int(a) for a in given["pad"])
    if len(amounts) != 4 or mode not in ("constant", "reflect", "replicate", "circular") or min(amounts) < 0:
        raise SkipError(f"layer masking does not know {name} of {amounts} in mode {mode!r}")
    value = given.get("value")
    op = Pad(name, (_number(x),), amounts, mode, float(value or 0.0), run.widest)
    action = run.emit(op)
    source = run.boxes[op.inputs[0]]
    assert source is not None
    return run.tag(run_pad(op, action, x, source), spot, positive=spot.positive, padded=True)


def _axes(value: Any, ndim: int) -> tuple[int, ...]:
    if value is None:
        return tuple(range(-ndim, 0))
    values = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(sorted(v if v < 0 else v - ndim for v in values))


def _reduce(how: str) -> Rule:
    def rule(
        run: MaskedRun, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
    ) -> Any:
        from skipguide.vision.layer_masking.run import cast, laid

        x = args[0] if args else kwargs["input"]
        spot = _spot(x)
        kwargs = dict(kwargs)
        if how == "norm":
            if name == "vector_norm" or "ord" in kwargs:
                p, dim = kwargs.get("ord", args[1] if len(args) > 1 else 2), kwargs.get("dim", _at(args, 2))
                keepdim = kwargs.get("keepdim", _at(args, 3, False))
            else:
                p, dim = kwargs.get("p", _at(args, 1, "fro")), kwargs.get("dim", _at(args, 2))
                keepdim = kwargs.get("keepdim", _at(args, 3, False))
            if p not in (2, 2.0, "fro", None):
                raise SkipError(f"layer masking knows the 2-norm over positions; got {name} with p={p}")
        else:
            dim = kwargs.get("dim", kwargs.get("axis", _at(args, 1)))
            keepdim = kwargs.get("keepdim", _at(args, 2, False))
        axes = _axes(dim, x.ndim)
        if not set(axes) & set(spot.dims):
            return _channels(run, func, name, args, kwargs, x, spot, axes, bool(keepdim))
        if not set(spot.dims) <= set(axes) or x.ndim != 4 or -x.ndim in axes:
            raise SkipError(f"layer masking knows {name} over both position dimensions or none; got dim={dim}")
        op = Reduce(name, (_number(x),), how)  # type: ignore[arg-type]
        action = run.emit(op)
        if how == "max":
            low = torch.finfo(x.dtype).min
            seen = x if action.part is None else x.masked_fill(laid(action.part, spot.dims, 4) == 0, low)
            out = seen.amax(axes, keepdim=bool(keepdim))
            out = out.masked_fill(out == low, 0.0) if action.part is not None else out
        else:
            if action.part is not None:
                x = x * cast(laid(action.part, spot.dims, 4), x)
            if how == "norm":
                out = torch.linalg.vector_norm(x, 2, axes, keepdim=bool(keepdim))
            elif action.scale is None:
                out = x.mean(axes, keepdim=bool(keepdim)) if how == "mean" else x.sum(axes, keepdim=bool(keepdim))
            else:
                out = _mean(x, axes, bool(keepdim), action.scale, spot)
        run.tag(out, spot)
        return out

    return rule


def _mean(x: Tensor, axes: tuple[int, ...], keepdim: bool, scale: Tensor, spot: Spot) -> Tensor:
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
    run: MaskedRun, func: Any, name: str, args: Arguments, kwargs: Any, x: Tensor, spot: Spot, axes: Any, keepdim: bool
) -> Any:
    """A reduction over channels: positions stay."""
    if not keepdim and any(axis > min(spot.dims) for axis in axes):
        raise SkipError(f"layer masking does not know {name} over channels after positions without keepdim")
    run.emit(Pointwise(name, (_number(x),)))
    out = func(*args, **kwargs)
    if not isinstance(out, Tensor):
        raise SkipError(f"layer masking does not know {name} with indices")
    return run.tag(out, spot)


def _at(args: Arguments, place: int, default: Any = None) -> Any:
    return args[place] if len(args) > place else default


def adaptive_avg_pool2d(
    run: MaskedRun, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Tensor:
    """The mean over visible positions, of everything or per bin."""
    from skipguide.vision.layer_masking.run import cast

    given = dict(zip(("input", "output_size"), args, strict=False)) | dict(kwargs)
    x, size = given["input"], given["output_size"]
    spot = _map(x, name)
    number = _number(x)
    full = run.mask(number).shape[-2:]
    pair = [size, size] if isinstance(size, int) or size is None else list(size)
    height, width = (int(f) if s is None else int(s) for s, f in zip(pair, full, strict=True))
    if (height, width) == (1, 1):
        return RULES["mean"](run, torch.mean, "mean", (x, (-2, -1), True), {}, placed)
    run.fixed = run.fixed or f"{name} to {height}x{width} bins"
    action = run.emit(Adaptive(name, (number,), (height, width)))
    out = func(x if action.part is None else x * cast(action.part, x), (height, width))
    return run.tag(out if action.scale is None else out * cast(action.scale, out), spot)


def adaptive_max_pool2d(
    run: MaskedRun, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Any:
    """The largest of everything visible."""
    given = dict(zip(("input", "output_size", "return_indices"), args, strict=False)) | dict(kwargs)
    if given["output_size"] not in (1, (1, 1), [1, 1]) or given.get("return_indices"):
        raise SkipError(f"layer masking knows {name} to one value; got {given['output_size']}")
    return RULES["amax"](run, torch.amax, "amax", (given["input"], (-2, -1), True), {}, placed)


def permute(
    run: MaskedRun, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Tensor:
    """Another order of the dimensions."""
    x = args[0] if args else kwargs["input"]
    spot = _spot(x)
    order = list(range(x.ndim))
    if name == "permute":
        dims = kwargs.get("dims", args[1:])
        dims = dims[0] if len(dims) == 1 and isinstance(dims[0], (list, tuple)) else dims
        order = [d % x.ndim for d in dims]
    else:
        a, b = (d % x.ndim for d in (_at(args, 1, kwargs.get("dim0")), _at(args, 2, kwargs.get("dim1"))))
        order[a], order[b] = order[b], order[a]
    placed_at = tuple(order.index(d % x.ndim) - x.ndim for d in spot.dims)
    if placed_at[0] + 1 != placed_at[1]:
        raise SkipError(f"layer masking needs height and width side by side, in this order; got {name} to {order}")
    run.emit(Pointwise(name, (_number(x),)))
    return run.tag(func(*args, **kwargs), spot, dims=placed_at, positive=spot.positive)


def layer_norm(
    run: MaskedRun, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Tensor:
    """Norms and linear maps over the last dimension, which has to be the channels."""
    x = args[0] if args else kwargs["input"]
    shape = kwargs.get("normalized_shape", _at(args, 1, (1,))) if "norm" in name else (1,)
    if -1 in _spot(x).dims or (not isinstance(shape, int) and len(shape) != 1):
        raise SkipError(f"layer masking knows {name} over channels only; got activations {tuple(x.shape)}")
    return pointwise(run, func, name, args, kwargs, placed)


def cat(
    run: MaskedRun, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Tensor:
    """Side by side in channels: visible where all of them are."""
    values: Sequence[Tensor] = kwargs.get("tensors", _at(args, 0))
    dim = kwargs.get("dim", kwargs.get("axis", _at(args, 1, 0)))
    axis = _axes(dim, values[0].ndim)[0]
    spot = _spot(placed[0])
    if axis in spot.dims or axis == -values[0].ndim:
        raise SkipError(f"layer masking knows {name} of channels; got dim={dim}")
    out: Tensor = pointwise(run, func, name, args, kwargs, placed)
    _spot(out).positive = len(placed) == len(values) and all(_spot(t).positive for t in placed)
    return out


def split(
    run: MaskedRun, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Any:
    """Groups of channels."""
    x = args[0] if args else kwargs.get("input", kwargs.get("tensor"))
    spot = _spot(x)
    axis = _axes(kwargs.get("dim", _at(args, 2, 0)), x.ndim)[0]
    if axis in spot.dims or axis == -x.ndim:
        raise SkipError(f"layer masking knows {name} of channels; got dimension {axis}")
    run.emit(Pointwise(name, (_number(x),)))
    parts = func(*args, **kwargs)
    for part in parts:
        run.tag(part, spot, positive=spot.positive)
    return parts


def reshape(
    run: MaskedRun, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Tensor:
    """Another shape: with the positions kept (channel groups), or with all of them made features."""
    x = args[0] if args else kwargs["input"]
    spot, number = _spot(x), _number(x)
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
        from skipguide.vision.layer_masking.run import hidden_zero

        action = run.emit(op_leave)
        return run.tag(
            func(hidden_zero(x, action, spot), *args[1:], **{k: v for k, v in kwargs.items() if k != "input"}), spot
        )
    raise SkipError(f"layer masking does not know {name} of {tuple(x.shape)} to {tuple(plain.shape)}")


def expand_as(
    run: MaskedRun, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Any:
    """A pooled value for every position: it is left as it is, since what follows broadcasts."""
    from skipguide.vision.layer_masking.run import spot_of

    x, other = args[0], args[1] if len(args) > 1 else kwargs["other"]
    mine = spot_of(x)
    if mine is not None and mine.number is not None:
        if x.shape[-2:] != other.shape[-2:]:
            raise SkipError(f"layer masking does not know {name} of {tuple(x.shape)} to {tuple(other.shape)}")
        return x
    return x


def getitem(
    run: MaskedRun, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Tensor:
    """Some channels, or some rows; the masks' rows go with them."""
    x, index = args
    if not isinstance(x, Tensor) or not any(x is t for t in placed):
        raise SkipError(f"layer masking does not know {name} with an activation as index")
    spot, number = _spot(x), _number(x)
    index = index if isinstance(index, tuple) else (index,)
    if Ellipsis in [i for i in index if not isinstance(i, Tensor)]:
        place = next(n for n, i in enumerate(index) if i is Ellipsis)
        index = (*index[:place], *([slice(None)] * (x.ndim - len(index) + 1)), *index[place + 1 :])
    rest = [i for i in index[1:] if i != slice(None)] if len(index) > 1 else []
    first = index[0]
    for axis, i in enumerate(index):
        if axis - x.ndim in spot.dims and i != slice(None):
            raise SkipError(f"layer masking does not know indices of positions; got {index}")
    if first == slice(None) if not isinstance(first, Tensor) else False:
        if any(i is None for i in index):
            raise SkipError(f"layer masking does not know new dimensions by index; got {index}")
        run.emit(Pointwise(name, (number,)))
        return run.tag(func(*args, **kwargs), spot, positive=spot.positive)
    if rest or not isinstance(first, (Tensor, slice)):
        raise SkipError(f"layer masking knows rows by a tensor or a slice; got {index}")
    return _rows(run, func, name, args, kwargs, x, first)


def _rows(
    run: MaskedRun, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], x: Tensor, index: Any
) -> Tensor:
    spot, mask = _spot(x), run.mask(_number(x))
    rows = mask if mask.shape[0] == 1 else mask[index]
    run.emit_rows(rows, f"{name} takes rows")
    return run.tag(func(*args, **kwargs), spot, positive=spot.positive)


def index_select(
    run: MaskedRun, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Tensor:
    """Rows, or channels."""
    given = dict(zip(("input", "dim", "index"), args, strict=False)) | dict(kwargs)
    x, axis = given["input"], _axes(given["dim"], given["input"].ndim)[0]
    if axis in _spot(x).dims:
        raise SkipError(f"layer masking does not know {name} of positions")
    if axis != -x.ndim:
        return pointwise(run, func, name, args, kwargs, [x])
    return _rows(run, func, name, args, kwargs, x, given["index"])


def scatter(
    run: MaskedRun, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
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
    mask = run.mask(_number(into)).expand(rows, -1, -1, -1).clone()
    mask[index] = run.mask(_number(source)).expand(source.shape[0], -1, -1, -1)
    spot = _spot(into)
    out = func(*args, **kwargs)
    run.emit_rows(mask, f"{name} puts rows")
    positive = spot.positive and _spot(source).positive
    if out is None:  # `a[rows] = b`
        run.tag(into, spot, positive=positive)
        return None
    return run.tag(out, spot, positive=positive)


def choose(
    run: MaskedRun, func: Any, name: str, args: Arguments, kwargs: Mapping[str, Any], placed: list[Tensor]
) -> Tensor:
    """`torch.where` with a decision per row: rows keep their masks; else the intersection."""
    if len(args) < 3:
        raise SkipError(f"layer masking knows {name} with a condition and two values")
    condition, a, b = args[:3]
    ones = isinstance(condition, Tensor) and condition.numel() == condition.shape[0] if condition.ndim else False
    if ones and len(placed) == 2 and isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim == condition.ndim:
        mine, other = run.mask(_number(a)), run.mask(_number(b))
        spot = _spot(a)
        if mine is other:
            return pointwise(run, func, name, args, kwargs, placed)
        run.emit_rows(torch.where(condition, mine, other), f"{name} chooses rows")
        return run.tag(func(*args, **kwargs), spot, positive=spot.positive and _spot(b).positive)
    return pointwise(run, func, name, args, kwargs, placed)


RULES: dict[str, Rule] = {
    **dict.fromkeys(UNARY | BINARY, pointwise),
    **dict.fromkeys(("layer_norm", "linear", "rms_norm"), layer_norm),
    **dict.fromkeys(("permute", "transpose", "swapaxes"), permute),
    **dict.fromkeys(("flatten", "reshape", "view", "unflatten"), reshape),
    **dict.fromkeys(("cat", "concat", "concatenate"), cat),
    **dict.fromkeys(("split", "chunk", "tensor_split", "split_with_sizes"), split),
    **dict.fromkeys(("index_copy", "index_put", "setitem"), scatter),
    **dict.fromkeys(("norm", "vector_norm"), _reduce("norm")),
    "conv2d": conv2d,
    "max_pool2d": _pool("max"),
    "avg_pool2d": _pool("avg"),
    "pad": pad,
    "mean": _reduce("mean"),
    "sum": _reduce("sum"),
    "amax": _reduce("max"),
    "adaptive_avg_pool2d": adaptive_avg_pool2d,
    "adaptive_max_pool2d": adaptive_max_pool2d,
    "expand_as": expand_as,
    "getitem": getitem,
    "index_select": index_select,
    "where": choose,
}

__all__ = ["RULES", "apply_rule"]
