"""Sheets: text and pictures on a white background, next to each other, below each other, in a grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from skipguide.errors import SkipError
from skipguide.media.fonts import legible

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

PAPER = (255, 255, 255)
INK = (24, 24, 27)
FAINT = (113, 113, 122)
TEXT_SIZE = 15


def wrap(text: str, width: int, size: int = TEXT_SIZE) -> list[str]:
    """Break `text` into lines that fit `width` pixels; a word that is too long for a line is cut short."""
    text, font = legible(text, size)
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}" if line else word
            if font.getlength(longer) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            line = _shortened(word, width, font)
        lines.append(line)
    return lines


def _write(
    draw: ImageDraw, at: tuple[int, int], text: str, fill: tuple[int, int, int], size: int, anchor: str | None = None
) -> None:
    text, font = legible(text, size)
    draw.text(at, text, fill=fill, font=font, anchor=anchor)


def _width(text: str, size: int) -> float:
    text, font = legible(text, size)
    return font.getlength(text)


def _shortened(word: str, width: int, font: FreeTypeFont | ImageFont) -> str:
    if font.getlength(word) <= width:
        return word
    while word and font.getlength(word + "...") > width:
        word = word[:-1]
    return word + "..."


def _line_height(size: int) -> int:
    return round(size * 1.35)


def banner(text: str | Sequence[str], width: int, size: int = TEXT_SIZE, lines: int = 0) -> Image:
    """A white strip with text on it, `width` pixels wide and at least `lines` lines high."""
    from PIL import Image, ImageDraw

    wrapped = wrap(text, width - 8, size) if isinstance(text, str) else list(text)
    step = _line_height(size)
    strip = Image.new("RGB", (width, step * max(lines, len(wrapped)) + 6), PAPER)
    draw = ImageDraw.Draw(strip)
    for i, line in enumerate(wrapped):
        _write(draw, (4, 3 + i * step), line, INK, size)
    return strip


def label(image: Image, text: str, size: int = TEXT_SIZE, lines: int = 0) -> Image:
    """The image with a line of text above it.

    Args:
        image: the picture; it is not changed.
        text: the label, wrapped to the picture's width.
        size: height of the letters in pixels.
        lines: room for at least this many lines, so that neighbours line up.
    """
    return stacked([banner(text, image.width, size, lines), image], gap=0)


def stacked(images: Sequence[Image], gap: int = 4) -> Image:
    """Images below each other, left-aligned, on white."""
    from PIL import Image

    height = sum(image.height for image in images) + gap * (len(images) - 1)
    canvas = Image.new("RGB", (max(image.width for image in images), height), PAPER)
    y = 0
    for image in images:
        canvas.paste(image, (0, y))
        y += image.height + gap
    return canvas


def in_a_row(images: Sequence[Image], gap: int = 4) -> Image:
    """Images next to each other, top-aligned, on white."""
    from PIL import Image

    width = sum(image.width for image in images) + gap * (len(images) - 1)
    canvas = Image.new("RGB", (width, max(image.height for image in images)), PAPER)
    x = 0
    for image in images:
        canvas.paste(image, (x, 0))
        x += image.width + gap
    return canvas


def side_by_side(clips: Sequence[Sequence[Image]], labels: Sequence[str], title: str = "", gap: int = 8) -> list[Image]:
    """Play clips next to each other.

    Args:
        clips: clips of the same length.
        labels: one text per clip, drawn above it.
        title: text above everything.
        gap: pixels between the clips.

    Returns:
        One image per frame.
    """
    if len(clips) != len(labels) or len({len(clip) for clip in clips}) != 1:
        raise SkipError(
            f"expected clips of the same length and one label each; got {len(labels)} labels for clips of "
            f"{[len(clip) for clip in clips]} frames"
        )
    lines = max(len(wrap(text, clip[0].width - 8)) for clip, text in zip(clips, labels, strict=True))
    frames = [
        in_a_row([label(image, text, lines=lines) for image, text in zip(images, labels, strict=True)], gap)
        for images in zip(*clips, strict=True)
    ]
    return [stacked([banner(title, frame.width), frame], gap=0) for frame in frames] if title else frames


def contact_sheet(
    rows: Sequence[Sequence[Image | None]],
    *,
    title: str = "",
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    gap: int = 8,
    size: int = TEXT_SIZE,
) -> Image:
    """Pictures in a grid, on one sheet.

    Args:
        rows: the pictures, row by row; None leaves a place empty.
        title: text above everything, wrapped to the sheet's width.
        row_labels: text left of each row.
        column_labels: text above each column.
        captions: small text below each picture, row by row, wrapped to its width.
        gap: pixels between the pictures.
        size: height of the letters in pixels; captions are a little smaller.

    Returns:
        The sheet.
    """
    from PIL import Image, ImageDraw

    columns = max((len(row) for row in rows), default=0)
    if columns == 0:
        raise SkipError("expected at least one picture for a contact sheet; got none")
    for name, texts, expected in (("row", row_labels, len(rows)), ("column", column_labels, columns)):
        if texts and len(texts) != expected:
            raise SkipError(f"expected {expected} {name} labels; got {len(texts)}")
    small = max(9, size - 3)
    cells = [[row[j] if j < len(row) else None for j in range(columns)] for row in rows]
    widths = [max((cell.width for row in cells if (cell := row[j]) is not None), default=1) for j in range(columns)]
    heights = [max((cell.height for cell in row if cell is not None), default=1) for row in cells]
    notes = [[wrap(text, w, small) for text, w in zip(texts, widths, strict=False)] for texts in captions]
    notes += [[]] * (len(rows) - len(notes))
    below = [max((len(lines) for lines in texts), default=1) * _line_height(small) + 2 for texts in notes]
    below = below if captions else [0] * len(rows)

    left = gap + (round(max(_width(text, size) for text in row_labels)) + gap if row_labels else 0)
    wrapped = [wrap(text, width, size) for text, width in zip(column_labels, widths, strict=False)]
    header = max((len(lines) for lines in wrapped), default=0) * _line_height(size)
    width = left + sum(widths) + gap * columns
    heading = wrap(title, width - 2 * gap, size) if title else []
    top = gap + len(heading) * _line_height(size) + (gap if heading else 0)
    height = top + header + sum(heights) + sum(below) + len(rows) * gap

    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(heading):
        _write(draw, (gap, gap + i * _line_height(size)), line, INK, size)
    xs = [left + sum(widths[:j]) + gap * j for j in range(columns)]
    for x, lines in zip(xs, wrapped, strict=False):
        for i, line in enumerate(lines):
            _write(draw, (x, top + i * _line_height(size)), line, INK, size)
    y = top + header
    for i, row in enumerate(cells):
        if row_labels:
            _write(draw, (gap, y + heights[i] // 2), row_labels[i], INK, size, anchor="lm")
        for j, cell in enumerate(row):
            if cell is not None:
                sheet.paste(cell, (xs[j], y))
            for k, line in enumerate(notes[i][j] if j < len(notes[i]) else []):
                _write(draw, (xs[j], y + heights[i] + 1 + k * _line_height(small)), line, FAINT, small)
        y += heights[i] + below[i] + gap
    return sheet
