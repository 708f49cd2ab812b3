"""Panels: pictures in a row under large words, each with a bar below it that says what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from skipguide.media import pictures

SIDE, SIZE, BAR = 224, 22, 16  # pixels: a picture, its words, its bar
COST = (37, 99, 235)
EMPTY = (226, 232, 240)


@dataclass(frozen=True)
class Panel:
    """One picture.

    Args:
        picture: it, in any size.
        words: above it.
        share: of the longest bar.
        cost: words under the bar.
    """

    picture: Image.Image
    words: str
    share: float
    cost: str


def row(panels: Sequence[Panel], title: str) -> Image.Image:
    """All panels next to each other, under a title."""
    drawn = [_panel(panel) for panel in panels]
    found = pictures.in_a_row(drawn, gap=10)
    return pictures.stacked([pictures.banner(title, found.width, SIZE), found], gap=2)


def _panel(panel: Panel) -> Image.Image:
    shown = panel.picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)
    bar = Image.new("RGB", (SIDE, BAR), EMPTY)
    ImageDraw.Draw(bar).rectangle((0, 0, round(panel.share * SIDE) - 1, BAR - 1), fill=COST)
    named = pictures.label(shown, panel.words, SIZE)
    return pictures.stacked([named, bar, pictures.banner(panel.cost, SIDE, SIZE)], gap=5)
