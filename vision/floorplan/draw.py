"""Pictures of plans, with names in the rooms and a legend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from skipguide.errors import SkipError
from skipguide.media.frames import comfortable_zoom
from skipguide.media.sheets import INK, PAPER, banner, in_a_row, stacked
from skipguide.vision.floorplan.plan import BACKGROUND, CLASSES, STRUCTURE, as_classes
from skipguide.vision.floorplan.regions import innermost, regions

if TYPE_CHECKING:
    from PIL.Image import Image

# Distinct in hue and in lightness; an ignored pixel is grey.
COLOURS = (
    (140, 180, 222),
    (245, 203, 120),
    (236, 139, 112),
    (250, 228, 178),
    (222, 214, 202),
    (160, 132, 168),
    (190, 160, 130),
    (120, 196, 190),
    (162, 205, 130),
    (40, 42, 48),
    (255, 255, 255),
)
UNKNOWN = (170, 170, 170)


def draw_plan(
    classes: Tensor, *, height: int = 384, labels: bool = True, legend: bool = True, title: str = ""
) -> Image:
    """A plan as a picture that explains itself.

    Args:
        classes: `[H, W]`, a class per pixel, or logits `[11, H, W]`.
        height: least height of the drawing in pixels; it is enlarged by a whole factor.
        labels: names in the rooms where they fit.
        legend: the classes that occur, with their share of the floor.
        title: text above.

    Raises:
        SkipError: for another shape.
    """
    from PIL import Image

    found = as_classes(classes)
    if found.ndim != 2 or found.numel() == 0 or found.is_floating_point():
        raise SkipError(f"expected classes [H, W] or logits [classes, H, W]; got {tuple(classes.shape)}")
    values = found.numpy()
    palette = np.array([*COLOURS, UNKNOWN], dtype=np.uint8)
    inside = (values >= 0) & (values < len(COLOURS))
    pixels = palette[np.where(inside, values, len(COLOURS))]
    zoom = comfortable_zoom(values.shape[0], height)
    picture = Image.fromarray(pixels).resize((values.shape[1] * zoom, values.shape[0] * zoom), Image.Resampling.NEAREST)
    if labels:
        _write_names(picture, values, zoom)
    parts = [picture, _legend(values, picture.height)] if legend else [picture]
    drawing = in_a_row(parts, gap=12)
    return stacked([banner(title, drawing.width), drawing], gap=4) if title else drawing


def _write_names(picture: Image, values: np.ndarray, zoom: int) -> None:
    from PIL import ImageDraw, ImageFont

    draw = ImageDraw.Draw(picture)
    largest = max(10, min(18, picture.height // 26))
    rooms = regions(values)
    numbers, counts = np.unique(rooms, return_counts=True)
    for number, count in zip(numbers, counts, strict=True):
        kind = int(values.ravel()[number])
        if kind in (STRUCTURE, BACKGROUND) or not 0 <= kind < len(CLASSES) or count < max(6, values.size // 200):
            continue
        row, column = innermost(rooms == number)
        walls = np.flatnonzero(rooms[row] != number)
        left = int(max(walls[walls < column], default=-1)) + 1
        right = int(min(walls[walls > column], default=values.shape[1]))
        words = CLASSES[kind].split()
        for size in range(largest, 8, -1):
            font = ImageFont.load_default(size)
            if max(font.getlength(word) for word in words) + 6 <= (right - left) * zoom:
                centre = ((left + right) / 2 * zoom, (row + 0.5) * zoom)
                text = "\n".join(words)
                draw.multiline_text(
                    centre, text, fill=INK, font=font, anchor="mm", align="center", stroke_width=2, stroke_fill=PAPER
                )
                break


def _legend(values: np.ndarray, height: int) -> Image:
    from PIL import Image, ImageDraw, ImageFont

    counts = np.bincount(values[(values >= 0) & (values < len(CLASSES))].ravel(), minlength=len(CLASSES))
    floor = max(int(counts[:STRUCTURE].sum()), 1)
    shown: Sequence[int] = [int(c) for c in np.flatnonzero(counts) if c != BACKGROUND]
    font = ImageFont.load_default(14)
    lines = [f"{CLASSES[c]}  {100 * counts[c] / floor:.0f} %" if c < STRUCTURE else CLASSES[c] for c in shown]
    width = 36 + round(max((font.getlength(line) for line in lines), default=0))
    strip = Image.new("RGB", (width, max(height, 24 * len(lines) + 8)), PAPER)
    draw = ImageDraw.Draw(strip)
    for at, (kind, line) in enumerate(zip(shown, lines, strict=True)):
        y = 4 + 24 * at
        draw.rectangle((2, y, 22, y + 16), fill=COLOURS[kind], outline=INK)
        draw.text((30, y + 8), line, fill=INK, font=font, anchor="lm")
    return strip
