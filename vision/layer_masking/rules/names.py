"""Names of torch's operations, sorted by what they mean for positions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import nn

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


# Questions about shape, type or place: answered as for the whole activation.
QUESTIONS = frozenset(
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


# In-place operations by their out-of-place form, for results that are smaller than the operand.
OUT_OF_PLACE = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "pow": torch.pow}
OUT_OF_PLACE |= {f"i{name}": function for name, function in OUT_OF_PLACE.items()} | {"itruediv": torch.div}

# Operations whose result is 0 or more; and those whose result is 0 or more if their input is.
NOT_NEGATIVE = frozenset(("relu", "relu6", "sigmoid", "hardsigmoid"))
KEEPS_SIGN = frozenset(
    ("dropout", "contiguous", "clone", "to", "float", "half", "bfloat16", "double", "type", "detach")
)


def name_of(func: Callable[..., Any]) -> str:
    """A function's name without the signs of operators and in-place forms."""
    name = getattr(func, "__name__", type(func).__name__)
    if name.startswith("__") and name.endswith("__"):
        return name.strip("_")
    return name.rstrip("_")


def running_module() -> str:
    """The class of the module that is running, as words for a message; it is found on the call stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return f" in {type(owner).__name__}"
        frame = frame.f_back
    return ""
