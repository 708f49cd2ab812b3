"""Charts as SVG texts, which stand in an HTML file as they are: intervals below each other, and lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from skipguide.bench.intervals import Interval
from skipguide.errors import SkipError

COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f", "#6b7280", "#92400e")
VERDICTS = {"better": "#047857", "worse": "#b91c1c"}
OTHER = "#52525b"


def forest(title: str, rows: Sequence[tuple[str, Interval, str]], axis: str) -> str:
    """Differences with their intervals, one below the other, and the line of no difference.

    Args:
        title: above it.
        rows: name, difference, and verdict (`better` and `worse` have colours).
        axis: what the numbers are.

    Raises:
        SkipError: without a row.
    """
    if not rows:
        raise SkipError("expected at least one row for a chart; got none")
    left, width, step, top = 150, 460, 24, 34
    reach = max(abs(each.mean) + (each.half or 0.0) for _, each, _ in rows)
    limit = _cut(reach, [abs(each.mean) for _, each, _ in rows])
    height = top + step * len(rows) + 44

    def x(value: float) -> float:
        return left + width / 2 * (1 + max(-limit, min(limit, value)) / limit)

    parts = [f'<text x="{left}" y="16" class="title">{escape(title)}</text>']
    bottom = top + step * len(rows)
    for tick in (-limit, -limit / 2, 0.0, limit / 2, limit):
        parts.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top - 6}" y2="{bottom}" class="grid"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{_short(tick)}</text>')
    parts.append(f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{top - 6}" y2="{bottom}" class="zero"/>')
    for number, (name, each, verdict) in enumerate(rows):
        y, colour = top + step * number + step / 2, VERDICTS.get(verdict, OTHER)
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        if each.half is not None:
            low, high = x(each.mean - each.half), x(each.mean + each.half)
            parts.append(f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<circle cx="{x(each.mean):.1f}" cy="{y}" r="4.5" fill="{colour}"/>')
    parts.append(f'<text x="{left + width / 2}" y="{bottom + 34}" text-anchor="middle">{escape(axis)}</text>')
    return _svg(left + width + 30, height, parts)


def lines(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    axes: tuple[str, str],
    *,
    logarithmic: bool = False,
) -> str:
    """Lines with their points.

    Args:
        title: above it.
        series: name -> (x, y), in order of x.
        axes: what x and y are.
        logarithmic: the scale of y.

    Raises:
        SkipError: without a point.
    """
    points = [point for values in series.values() for point in values]
    if not points:
        raise SkipError("expected at least one point for a chart; got none")
    left, top, width, height = 64, 34, 420, 250

    def level(value: float) -> float:
        return math.log10(max(value, 1e-12)) if logarithmic else value

    low_x, high_x = _span([x for x, _ in points])
    low_y, high_y = _span([level(y) for _, y in points])

    def at(point: tuple[float, float]) -> tuple[float, float]:
        x, y = point
        return (
            left + width * (x - low_x) / (high_x - low_x),
            top + height * (1 - (level(y) - low_y) / (high_y - low_y)),
        )

    parts = [f'<text x="{left}" y="16" class="title">{escape(title)}</text>']
    for share in (0, 0.25, 0.5, 0.75, 1):
        y, value = top + height * (1 - share), low_y + share * (high_y - low_y)
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y}" y2="{y}" class="grid"/>')
        parts.append(
            f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{_short(10**value if logarithmic else value)}</text>'
        )
    for x in sorted({x for x, _ in points}):
        place = left + width * (x - low_x) / (high_x - low_x)
        parts.append(f'<text x="{place:.1f}" y="{top + height + 16}" text-anchor="middle">{_short(x)}</text>')
    for number, (name, values) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        placed = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, values))
        parts.append(f'<polyline points="{placed}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in map(at, values)]
        y = top + 16 * number + 6
        parts.append(f'<rect x="{left + width + 14}" y="{y - 5}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{left + width + 30}" y="{y + 4}">{escape(name)}</text>')
    parts.append(f'<text x="{left + width / 2}" y="{top + height + 34}" text-anchor="middle">{escape(axes[0])}</text>')
    label = f"translate(14 {top + height / 2}) rotate(-90)"
    parts.append(f'<text transform="{label}" text-anchor="middle">{escape(axes[1])}</text>')
    return _svg(left + width + 210, max(top + height + 44, top + 16 * len(series) + 20), parts)


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    style = (
        "<style>text{font:12px sans-serif;fill:#27272a}.title{font-weight:bold}"
        ".grid{stroke:#e4e4e7}.zero{stroke:#18181b}</style>"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}">'
    return head + style + "".join(parts) + "</svg>"


def _cut(reach: float, middles: Sequence[float]) -> float:
    """How far the axis goes: over all of it, unless an interval (of two seeds, say) would crush everything else."""
    return min(reach, 4 * max(middles)) * 1.05 or 1.0


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.04 * (high - low) or 0.5 * abs(high) or 1.0
    return low - room, high + room


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1e6 else f"{value:.1e}"
