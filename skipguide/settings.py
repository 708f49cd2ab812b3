"""Settings: the numbers and flags that a user passes, as Python's own, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from skipguide.errors import SkipError
from skipguide.scalars import flag, native, number, whole


def as_whole(name: str, value: Any, least: int | None = 1) -> int:
    """A whole number of at least `least` (None: any), NumPy's and torch's too.

    Raises:
        SkipError: for anything else.

    Example:
        >>> import numpy
        >>> as_whole("classes", numpy.int64(3))
        3
    """
    found = whole(value)
    if found is None or (least is not None and found < least):
        raise SkipError(f"expected {name} as a whole number{_limit(least)}; got {value!r}")
    return found


def as_wholes(**values: Any) -> list[int]:
    """Several counts from 1 on, by name.

    Raises:
        SkipError: naming the one that is something else.
    """
    return [as_whole(name, value) for name, value in values.items()]


def as_list(name: str, values: Any, fewest: int = 1) -> list[int]:
    """A list of counts from 1 on, `fewest` at least; any sequence or array is one.

    Raises:
        SkipError: for anything else.

    Example:
        >>> as_list("widths", range(8, 32, 8))
        [8, 16, 24]
    """
    found = native(values)
    if not isinstance(found, Sequence) or isinstance(found, str | bytes) or len(found) < fewest:
        raise SkipError(f"expected {name} as a list of whole numbers; got {values!r}")
    return [as_whole(f"each of {name}", value) for value in found]


def as_number(name: str, value: Any, least: float | None = 0) -> float:
    """A finite number of at least `least` (None: any), NumPy's and torch's too.

    Raises:
        SkipError: for anything else.
    """
    found = number(value)
    if found is None or (least is not None and found < least):
        raise SkipError(f"expected {name} as a finite number{_limit(least)}; got {value!r}")
    return found


def as_flag(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        SkipError: for anything else: a text like `"no"` would count as True.
    """
    found = flag(value)
    if found is None:
        raise SkipError(f"expected {name} as True or False; got {value!r}")
    return found


def is_one_of(value: Any, choices: Collection[str]) -> bool:
    """Whether a value is one of some words; anything may be asked, a list or an array too.

    Example:
        >>> is_one_of("map", ("map", "vector")), is_one_of(["map"], ("map", "vector"))
        (True, False)
    """
    return isinstance(value, str) and value in choices


def settle(
    config: object,
    wholes: Mapping[str, int | None] | None = None,
    numbers: Mapping[str, float | None] | None = None,
    flags: Collection[str] = (),
    optional: Collection[str] = (),
) -> None:
    """Bring fields of a frozen dataclass to Python's own numbers and flags, so that they compare and go to JSON.

    Args:
        config: the dataclass, in its `__post_init__`.
        wholes: fields that are whole numbers, and the least of each (None: any).
        numbers: fields that are finite numbers, and the least of each (None: any).
        flags: fields that are True or False.
        optional: of all of these, the ones that may be None.

    Raises:
        SkipError: for a field that is something else.
    """

    def put(name: str, take: Callable[..., Any], *least: float | None) -> None:
        value = getattr(config, name)
        if value is not None or name not in optional:
            object.__setattr__(config, name, take(name, value, *least))

    for name, least in (wholes or {}).items():
        put(name, as_whole, least)
    for name, lowest in (numbers or {}).items():
        put(name, as_number, lowest)
    for name in flags:
        put(name, as_flag)


def _limit(least: float | None) -> str:
    return "" if least is None else f" of at least {least}"
