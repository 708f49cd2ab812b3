"""Report: one HTML file that a person opens and sends back; pictures and charts are in it, and nothing from the net."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from skipguide.bench.intervals import Better, Interval

if TYPE_CHECKING:
    from PIL.Image import Image

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#18181b;max-width:1180px;margin:2em auto;padding:0 1em}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}
.lead{background:#f4f4f5;border-left:4px solid #52525b;padding:.7em 1em}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:13px}
th,td{padding:.3em .6em;border-bottom:1px solid #e4e4e7;text-align:right;vertical-align:top}
th{background:#fafafa}th:first-child,td:first-child{text-align:left;font-weight:600}
tr.baseline td{background:#eff6ff}td small{display:block;color:#71717a;white-space:nowrap}
.better{color:#047857}.worse{color:#b91c1c}.note{color:#52525b;font-size:13px}
img{max-width:100%}pre{background:#fafafa;padding:.8em;overflow-x:auto;font-size:12px}
dt{font-weight:600;margin-top:.5em}dd{margin-left:1.2em}
"""


@dataclass(frozen=True)
class Cell:
    """One place of a table.

    Attributes:
        text: what stands there.
        below: in small letters under it.
        mark: `better` or `worse`, for its colour, or empty.
    """

    text: str
    below: str = ""
    mark: str = ""

    def html(self) -> str:
        """The place as HTML."""
        small = f'<small class="{self.mark}">{escape(self.below)}</small>' if self.below else ""
        return f"<td>{escape(self.text)}{small}</td>"


@dataclass
class Report:
    """A report that is put together from top to bottom.

    Args:
        title: its heading.
        lead: what was found, in a sentence or two.
    """

    title: str
    lead: str
    parts: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """Begin a section."""
        self.parts.append(f"<h2>{escape(text)}</h2>")

    def note(self, text: str) -> None:
        """A paragraph of explanation."""
        self.parts.append(f'<p class="note">{escape(text)}</p>')

    def terms(self, of: Mapping[str, str]) -> None:
        """Names and what they mean."""
        items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(words)}</dd>" for name, words in of.items())
        self.parts.append(f"<dl>{items}</dl>")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Cell]], marked: int | None = None) -> None:
        """A table; `marked` is the row that the others are compared with."""
        top = "".join(f"<th>{escape(text)}</th>" for text in head)
        body = ""
        for number, row in enumerate(rows):
            kind = ' class="baseline"' if number == marked else ""
            body += f"<tr{kind}>{''.join(cell.html() for cell in row)}</tr>"
        self.parts.append(f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>')

    def chart(self, svg: str) -> None:
        """A chart of `skipguide.bench.charts`."""
        self.parts.append(f'<div class="scroll">{svg}</div>')

    def picture(self, image: Image, words: str) -> None:
        """A picture, in the file itself."""
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=88)
        data = base64.b64encode(buffer.getvalue()).decode()
        self.parts.append(f'<img alt="{escape(words, quote=True)}" src="data:image/jpeg;base64,{data}">')

    def code(self, text: str) -> None:
        """Text as it is."""
        self.parts.append(f"<pre>{escape(text)}</pre>")

    def html(self) -> str:
        """The whole file."""
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(self.title)}</title>'
            f"<style>{STYLE}</style></head><body><h1>{escape(self.title)}</h1>"
            f'<p class="lead">{escape(self.lead)}</p>{"".join(self.parts)}</body></html>\n'
        )


def compared(mean: float, against: Interval | None, better: Better | None) -> Cell:
    """A mean with its difference below it, coloured by what the interval says."""
    if against is None:
        return Cell(shown(mean))
    return Cell(shown(mean), difference(against), against.verdict(better))


def difference(of: Interval) -> str:
    """`+0.12 ± 0.05`, as exact as the interval is; without one where there is one value only.

    Example:
        >>> difference(Interval(0.03157, 0.00094, 3)), difference(Interval(12.4, 3.1, 3))
        ('+0.0316 ± 0.0009', '+12.4 ± 3.1')
    """
    sign = "+" if of.mean >= 0 else "−"
    if not of.half:
        return f"{sign}{shown(abs(of.mean))}" + ("" if of.half is None else " ± 0")
    first = math.floor(math.log10(of.half))  # the place of the first digit of the interval that counts
    digits = max(0, 1 - first if of.half / 10**first < 9.5 and first >= -3 else -first)
    return f"{sign}{abs(of.mean):.{digits}f} ± {of.half:.{digits}f}"


def shown(value: float) -> str:
    """Four digits that count at most."""
    return f"{value:.4g}" if abs(value) >= 1 else f"{value:.3g}"
