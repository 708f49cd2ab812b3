"""Shown: objects that print as a small table, and as an HTML one in a notebook."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from html import escape
from typing import Any

Row = Sequence[object]
_LONGEST = 12  # rows; a model has hundreds of sublayers, and a person reads a screen


class Shown:
    """A heading and a few rows, instead of a default repr that names an address or prints a whole model."""

    __slots__ = ()

    def _heading(self) -> str:
        return type(self).__name__

    def _rows(self) -> Iterable[Row]:
        """The rows, each of the same number of cells; the first one is the head of the columns."""
        return ()

    def _cells(self) -> list[list[str]]:
        rows = [[_said(cell) for cell in row] for row in self._rows()]
        if len(rows) > _LONGEST + 2:
            left = len(rows) - _LONGEST - 1
            rows = [*rows[: _LONGEST + 1], [f"... {left} more", *[""] * (len(rows[0]) - 1)]]
        return rows

    def __repr__(self) -> str:
        rows = self._cells()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n  ".join([self._heading(), *lines])

    def _repr_html_(self) -> str:
        rows = "".join(_line(row, "td" if number else "th") for number, row in enumerate(self._cells()))
        return f"<div><strong>{escape(self._heading())}</strong>{rows and f'<table>{rows}</table>'}</div>"


def _line(cells: Iterable[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _said(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:.3g}"
    if isinstance(cell, (tuple, list)):
        return ranges(cell) if cell and all(type(each) is int for each in cell) else " ".join(map(str, cell))
    return str(cell)


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers as people write them.

    Example:
        >>> ranges([0, 1, 2, 5])
        '0-2, 5'
    """
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def settings(config: Any) -> str:
    """The settings that were set, of a dataclass: those without a default and those that differ from it, rounded.

    Example:
        >>> from skipguide import SkipPlan
        >>> settings(SkipPlan([1, 2], "attn"))
        "SkipPlan(layers=(1, 2), part='attn')"
    """
    return _call(config, _rounded)


def brief(config: Any) -> str:
    """The same, exactly: the `__repr__` of settings, which makes an equal object where it is typed.

    Example:
        >>> from skipguide import SkipPlan
        >>> brief(SkipPlan([1, 2], start=0.123456))
        'SkipPlan(layers=(1, 2), start=0.123456)'
    """
    return _call(config, repr)


def _call(config: Any, said: Callable[[Any], str]) -> str:
    found = []
    for each in fields(config):
        usual = each.default if each.default_factory is MISSING else each.default_factory()
        if (value := getattr(config, each.name)) is not usual and value != usual:
            found.append(f"{each.name}={said(value)}")
    return f"{type(config).__name__}({', '.join(found)})"


def _rounded(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_rounded(item)}' for key, item in value.items())}}}"
    return repr(value)


def ledger_rows(calls: dict[str, int], skips: dict[str, int]) -> list[Row]:
    """Rows for a ledger: what was left out at some time, and how often it ran."""
    if not skips:
        return []
    return [("layer", "left out", "ran"), *((name, count, calls.get(name, 0)) for name, count in skips.items())]


def counted(count: int, name: str, plural: str = "") -> str:
    """A number of things in words.

    Example:
        >>> counted(1, "request"), counted(2, "pass", "passes")
        ('1 request', '2 passes')
    """
    return f"{count} {name if count == 1 else plural or f'{name}s'}"


def passes(count: int) -> str:
    """A number of passes in words."""
    return counted(count, "pass", "passes")
