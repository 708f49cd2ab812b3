"""Scalars: numbers and flags of any library as Python's own, so that settings compare, print and go to JSON alike."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def native(value: Any) -> Any:
    """What NumPy and torch hold, as Python's numbers and lists: 1.5 is not cut to 1, and a mask is no list of numbers.

    Example:
        >>> import torch
        >>> native(torch.tensor([True, False])), native("as it is")
        ([True, False], 'as it is')
    """
    return value.tolist() if hasattr(value, "tolist") else value


def number(value: Any) -> float | None:
    """A finite number as Python's int or float; None for anything else (a bool, a text, a list, infinity).

    Example:
        >>> import torch
        >>> number(torch.tensor(0.5)), number(3), number(True), number("3")
        (0.5, 3, None, None)
    """
    value = native(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        plain = int(value) if isinstance(value, Integral) else float(value)
        return plain if math.isfinite(plain) else None
    except OverflowError:  # a whole number that no float can hold
        return None


def whole(value: Any) -> int | None:
    """A whole number as Python's int; None for anything else, 3.0 among it.

    Example:
        >>> whole(3), whole(3.0), whole(False)
        (3, None, None)
    """
    value = native(value)
    if isinstance(value, bool) or not isinstance(value, Integral):
        return None
    return int(value)


def flag(value: Any) -> bool | None:
    """True or False as Python's; None for anything else, so that a text like `"no"` is not taken for True.

    Example:
        >>> flag(True), flag("no"), flag(1)
        (True, None, None)
    """
    value = native(value)
    return value if isinstance(value, bool) else None
