"""The arguments of an operation of torch, and the type of a rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from skipguide.errors import SkipError
from skipguide.vision.layer_masking.activation_info import ActivationInfo, info_at
from skipguide.vision.layer_masking.masked_pass import MaskedPass

Arguments = tuple[Any, ...]
# (pass, torch's function, its name, its arguments, the arguments that are activations with positions) -> the result
Rule = Callable[[MaskedPass, Callable[..., Any], str, Arguments, Mapping[str, Any], list[Tensor]], Any]


def argument(args: Arguments, place: int, default: Any = None) -> Any:
    """A positional argument, if it was given."""
    return args[place] if len(args) > place else default


def pair_of(value: Any) -> tuple[int, int]:
    """Height and width of a setting."""
    if isinstance(value, (list, tuple)):
        return (int(value[0]), int(value[-1]))
    return int(value), int(value)


def axes_of(value: Any, ndim: int) -> tuple[int, ...]:
    """Dimensions counted from the end, ascending; None: all."""
    if value is None:
        return tuple(range(-ndim, 0))
    values = value if isinstance(value, (list, tuple)) else (value,)
    return tuple(sorted(v if v < 0 else v - ndim for v in values))


def map_at(x: Any, name: str) -> ActivationInfo:
    """What is known of an activation in the layout of a convolution.

    Raises:
        SkipError: for another layout.
    """
    if not isinstance(x, Tensor) or x.ndim != 4 or info_at(x).number is None or info_at(x).dims != (-2, -1):
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise SkipError(f"layer masking knows {name} of activations [N, C, H, W]; got {shape}")
    return info_at(x)
