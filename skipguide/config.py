"""Config: frozen settings with a JSON round trip, the form of everything a user applies, and what their values may be.

Numbers and flags of any library become Python's own, so that settings compare, print and go to JSON alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Self

from skipguide.errors import SkipError
from skipguide.files import DEEPEST, is_shallow, read_json, replacing
from skipguide.shown import brief

VERSION = 1
LARGEST = 2**63 - 1  # of whole numbers: torch's seeds and sizes go no further


def write_json(path: str | Path, data: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Write JSON to a temporary name first, then rename: a reader never sees half a file.

    Raises:
        SkipError: if `path` exists and `overwrite` is False.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise SkipError(f"{target} exists; pass overwrite=True to replace it")
    with replacing(target) as (partial,):
        partial.write_text(json.dumps(data, indent=1), encoding="utf-8")


def check_keys(found: Mapping[str, Any], expected: set[str], what: str) -> None:
    """Refuse data with a version or keys that are not known here."""
    if not isinstance(found, Mapping):
        raise SkipError(f"expected {what} as a mapping of its settings; got {type(found).__name__}")
    if not is_shallow(found):
        raise SkipError(f"expected {what} that is nested at most {DEEPEST} deep; got more")
    if whole(found.get("version")) != VERSION:
        raise SkipError(f"expected {what} of version {VERSION}; got version {found.get('version')!r}")
    if unknown := set(found) - expected - {"version"}:
        raise SkipError(f"unknown keys in {what}: {sorted(unknown)}; expected {sorted(expected)}")


def plain_data(value: Any) -> Any:
    """Settings inside settings as plain data too."""
    if isinstance(value, JsonConfig):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: plain_data(item) for key, item in value.items()}
    return [plain_data(item) for item in value] if isinstance(value, tuple) else value


class JsonConfig:
    """Mixin for frozen dataclasses whose fields are plain data; made with `repr=False`, they print what differs."""

    __repr__ = brief

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with a version."""
        return {"version": VERSION} | {
            f.name: plain_data(getattr(self, f.name))
            for f in fields(self)  # type: ignore[arg-type]
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote; an unknown or missing key, or another version, is an error."""
        known = fields(cls)  # type: ignore[arg-type]
        check_keys(data, {f.name for f in known}, f"a {cls.__name__}")
        needed = {f.name for f in known if f.default is MISSING and f.default_factory is MISSING}
        if missing := needed - set(data):
            raise SkipError(f"a {cls.__name__} needs {sorted(missing)} too; got {sorted(data)}")
        return cls(**{k: v for k, v in data.items() if k != "version"})

    def save_json(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the settings; an existing file is kept unless `overwrite`."""
        write_json(path, self.to_dict(), overwrite=overwrite)

    @classmethod
    def load_json(cls, path: str | Path) -> Self:
        """Read settings that `save_json` wrote."""
        return cls.from_dict(read_json(path))


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
    """A whole number as Python's int; None for anything else: 3.0 too, and a number that 64 bits do not hold.

    Example:
        >>> whole(3), whole(3.0), whole(False)
        (3, None, None)
    """
    value = native(value)
    if isinstance(value, bool) or not isinstance(value, Integral):
        return None
    found = int(value)
    return found if abs(found) <= LARGEST else None


def flag(value: Any) -> bool | None:
    """True or False as Python's; None for anything else, so that a text like `"no"` is not taken for True.

    Example:
        >>> flag(True), flag("no"), flag(1)
        (True, None, None)
    """
    value = native(value)
    return value if isinstance(value, bool) else None


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
        too_large = isinstance(value, int) and abs(value) > LARGEST
        limit = " that 64 bits hold" if too_large else _limit(least)
        raise SkipError(f"expected {name} as a whole number{limit}; got {value!r}")
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


def as_text(name: str, value: Any) -> str:
    """A text.

    Raises:
        SkipError: for anything else.
    """
    if not isinstance(value, str):
        raise SkipError(f"expected {name} as a text; got {value!r}")
    return value


def as_numbers(name: str, values: Any, least: float | None = None, most: float | None = None) -> tuple[float, ...]:
    """A list of finite floats, each within the bounds that are given; texts are none, and no list of them.

    Raises:
        SkipError: naming the list and the place of the one that is something else.

    Example:
        >>> as_numbers("losses", [2, 0.5])
        (2.0, 0.5)
    """
    given = native(values)
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise SkipError(f"expected {name} as a list of numbers; got {values!r}")
    found = []
    for place, value in enumerate(given):
        plain = number(value)
        if plain is None or (least is not None and plain < least) or (most is not None and plain > most):
            limits = [
                f"{word} {limit:g}" for word, limit in (("at least", least), ("at most", most)) if limit is not None
            ]
            bounds = " and ".join(["finite", *limits])
            raise SkipError(f"expected {name} as a list of numbers, each {bounds}; number {place} is {value!r}")
        found.append(float(plain))
    return tuple(found)


def is_one_of(value: Any, choices: Collection[str]) -> bool:
    """Whether a value is one of some words; anything may be asked, a list or an array too.

    Example:
        >>> is_one_of("map", ("map", "vector")), is_one_of(["map"], ("map", "vector"))
        (True, False)
    """
    return isinstance(value, str) and value in choices


def normalize_fields(
    config: object,
    wholes: Mapping[str, int | None] | None = None,
    numbers: Mapping[str, float | None] | None = None,
    flags: Collection[str] = (),
    optional: Collection[str] = (),
    texts: Collection[str] = (),
) -> None:
    """Bring fields of a frozen dataclass to Python's own numbers and flags, so that they compare and go to JSON.

    Args:
        config: the dataclass, in its `__post_init__`.
        wholes: fields that are whole numbers, and the least of each (None: any).
        numbers: fields that are finite numbers, and the least of each (None: any).
        flags: fields that are True or False.
        optional: of all of these, the ones that may be None.
        texts: fields that are texts.

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
    for name in texts:
        put(name, as_text)


def _limit(least: float | None) -> str:
    return "" if least is None else f" of at least {least}"


def layer_tuple(layers: Iterable[int] | int) -> tuple[int, ...]:
    """Layer numbers as a tuple, each checked to be a whole number and named once."""
    try:
        found = native(layers)
        if isinstance(found, (bytes, bytearray, Mapping)):  # Python takes these for lists of numbers
            raise TypeError
        items = (found,) if isinstance(found, int) else tuple(native(item) for item in found)
    except TypeError:
        raise SkipError(f"expected block numbers, one or several; got {layers!r}") from None
    for item in items:
        if isinstance(item, bool) or not hasattr(item, "__index__") or abs(item) > LARGEST:
            named = ": skipguide.find_blocks(model) lists names and numbers" if isinstance(item, str) else ""
            raise SkipError(f"layers are block numbers (whole numbers from 0); got {item!r} in {items!r}{named}")
    numbers = tuple(int(item) for item in items)
    if len(set(numbers)) != len(numbers):
        raise SkipError(f"layers names a block twice: {numbers}")
    return numbers
