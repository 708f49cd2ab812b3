"""Pictures of clips: labels, clips side by side, contact sheets, files.

Everything takes and gives lists of Pillow images; `as_images` makes such a list of whatever a pipeline
returned. Pillow is imported when a function runs, so that importing this module costs nothing.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from skipguide.errors import SkipError

T = TypeVar("T")

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

PAPER = (255, 255, 255)
INK = (24, 24, 27)
FAINT = (113, 113, 122)
TEXT_SIZE = 15


# --- frames


def as_images(frames: Any) -> list[Image]:
    """Turn the frames of any pipeline into RGB Pillow images.

    Args:
        frames: a Pillow image, a list of them, or an array or tensor `[frames, height, width, channels]` or
            `[frames, channels, height, width]` (or a list of single frames), of bytes or of floats in 0..1.

    Returns:
        One RGB image per frame.

    Raises:
        SkipError: for an empty clip, another shape, or floats outside 0..1.
    """
    from PIL import Image

    if isinstance(frames, Image.Image):
        return [frames.convert("RGB")]
    if isinstance(frames, (list, tuple)):
        images = [image for frame in frames for image in as_images(frame)]
        if not images:
            raise SkipError("expected at least one frame; got an empty list")
        return images
    return [Image.fromarray(frame) for frame in _as_bytes(frames)]


def as_rgb(picture: Image, name: object = "the picture") -> Image:
    """A picture as RGB.

    Args:
        picture: of any mode.
        name: what to call it in an error.

    Raises:
        SkipError: for values beyond a byte, or floats: Pillow would cut them off at 255 without a word.
    """
    if picture.mode == "F" or picture.mode.startswith("I"):
        low, high = picture.getextrema()
        if picture.mode == "F" or not 0 <= low <= high <= 255:  # type: ignore[operator]
            raise SkipError(
                f"{name} has pixels of mode {picture.mode} with values {low} to {high}; expected 0 to 255: bring it to "
                "8 bits first"
            )
    return picture.convert("RGB")


def _as_bytes(frames: Any) -> Any:
    """An array `[frames, height, width, 3]` of bytes."""
    import numpy as np

    if hasattr(frames, "detach"):
        # bfloat16 has no numpy counterpart
        frames = frames.detach().cpu()
        frames = (frames.float() if frames.is_floating_point() else frames).numpy()
    array = np.asarray(frames)
    shape = array.shape
    while array.ndim > 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 3:
        array = array[None]
    if array.ndim == 4 and array.shape[-1] not in (1, 3, 4) and array.shape[1] in (1, 3, 4):
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise SkipError(
            f"expected frames of shape [frames, height, width, 3] or [frames, 3, height, width]; got {shape}"
        )
    if array.dtype != np.uint8:
        low, high = float(array.min()), float(array.max())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # also refuses NaN
            raise SkipError(f"expected bytes, or floats in 0..1; got {array.dtype} from {low:g} to {high:g}")
        array = (array.clip(0, 1) * 255).round().astype(np.uint8)
    return np.ascontiguousarray(np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array[..., :3])


def difference(left: Sequence[Image], right: Sequence[Image]) -> float:
    """Mean absolute difference between two clips of the same shape: 0 is equal, 1 is black against white."""
    import numpy as np

    if len(left) != len(right) or {i.size for i in left} != {i.size for i in right}:
        raise SkipError(
            f"expected two clips of the same shape; got {_shape(left)} and {_shape(right)}",
        )
    total = sum(
        float(np.abs(np.asarray(a, dtype=np.float32) - np.asarray(b, dtype=np.float32)).mean())
        for a, b in zip(left, right, strict=True)
    )
    return total / (255 * len(left))


def _shape(images: Sequence[Image]) -> str:
    return f"{len(images)} frames of {images[0].width}x{images[0].height}" if images else "no frames"


def pick(images: Sequence[T], count: int) -> list[T]:
    """At most `count` images, evenly spaced from the first to the last (the middle one for a count of 1)."""
    if count >= len(images):
        return list(images)
    if count == 1:
        return [images[len(images) // 2]]
    return [images[round(i * (len(images) - 1) / (count - 1))] for i in range(count)]


def comfortable_zoom(height: int, target: int = 256) -> int:
    """The smallest whole factor that makes `height` at least `target` pixels."""
    return max(1, math.ceil(target / height))


def resized(images: Iterable[Image], height: int) -> list[Image]:
    """Every image at `height` pixels, in proportion."""
    from PIL import Image

    return [
        image
        if image.height == height
        else image.resize((max(1, round(image.width * height / image.height)), height), Image.Resampling.LANCZOS)
        for image in images
    ]


# --- text and layout


def _font(size: int) -> FreeTypeFont | ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def wrap(text: str, width: int, size: int = TEXT_SIZE) -> list[str]:
    """Break `text` into lines that fit `width` pixels; a word that is too long for a line is cut short."""
    font = _font(size)
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


def _shortened(word: str, width: int, font: FreeTypeFont | ImageFont) -> str:
    if font.getlength(word) <= width:
        return word
    while word and font.getlength(word + "...") > width:
        word = word[:-1]
    return word + "..."


def _line_height(size: int) -> int:
    return round(size * 1.35)


def banner(text: str | Sequence[str], width: int, size: int = TEXT_SIZE, lines: int = 0) -> Image:
    """A strip of paper with text on it, `width` pixels wide and at least `lines` lines high."""
    from PIL import Image, ImageDraw

    wrapped = wrap(text, width - 8, size) if isinstance(text, str) else list(text)
    step = _line_height(size)
    strip = Image.new("RGB", (width, step * max(lines, len(wrapped)) + 6), PAPER)
    draw = ImageDraw.Draw(strip)
    for i, line in enumerate(wrapped):
        draw.text((4, 3 + i * step), line, fill=INK, font=_font(size))
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
    """Images below each other, left-aligned, on paper."""
    from PIL import Image

    height = sum(image.height for image in images) + gap * (len(images) - 1)
    canvas = Image.new("RGB", (max(image.width for image in images), height), PAPER)
    y = 0
    for image in images:
        canvas.paste(image, (0, y))
        y += image.height + gap
    return canvas


def in_a_row(images: Sequence[Image], gap: int = 4) -> Image:
    """Images next to each other, top-aligned, on paper."""
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
    small, font = max(9, size - 3), _font(size)
    cells = [[row[j] if j < len(row) else None for j in range(columns)] for row in rows]
    widths = [max((cell.width for row in cells if (cell := row[j]) is not None), default=1) for j in range(columns)]
    heights = [max((cell.height for cell in row if cell is not None), default=1) for row in cells]
    notes = [[wrap(text, w, small) for text, w in zip(texts, widths, strict=False)] for texts in captions]
    notes += [[]] * (len(rows) - len(notes))
    below = [max((len(lines) for lines in texts), default=1) * _line_height(small) + 2 for texts in notes]
    below = below if captions else [0] * len(rows)

    left = gap + (round(max(font.getlength(text) for text in row_labels)) + gap if row_labels else 0)
    wrapped = [wrap(text, width, size) for text, width in zip(column_labels, widths, strict=False)]
    header = max((len(lines) for lines in wrapped), default=0) * _line_height(size)
    width = left + sum(widths) + gap * columns
    heading = wrap(title, width - 2 * gap, size) if title else []
    top = gap + len(heading) * _line_height(size) + (gap if heading else 0)
    height = top + header + sum(heights) + sum(below) + len(rows) * gap

    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(heading):
        draw.text((gap, gap + i * _line_height(size)), line, fill=INK, font=font)
    xs = [left + sum(widths[:j]) + gap * j for j in range(columns)]
    for x, lines in zip(xs, wrapped, strict=False):
        for i, line in enumerate(lines):
            draw.text((x, top + i * _line_height(size)), line, fill=INK, font=font)
    y = top + header
    for i, row in enumerate(cells):
        if row_labels:
            draw.text((gap, y + heights[i] // 2), row_labels[i], fill=INK, font=font, anchor="lm")
        for j, cell in enumerate(row):
            if cell is not None:
                sheet.paste(cell, (xs[j], y))
            for k, line in enumerate(notes[i][j] if j < len(notes[i]) else []):
                draw.text((xs[j], y + heights[i] + 1 + k * _line_height(small)), line, fill=FAINT, font=_font(small))
        y += heights[i] + below[i] + gap
    return sheet


# --- files


def save_gif(images: Sequence[Image], path: str | os.PathLike[str], fps: float = 8.0) -> None:
    """Write a looping GIF.

    All frames share one palette, as a palette per frame makes flat colours flicker.

    Args:
        images: the frames.
        path: the file.
        fps: frames per second. A GIF counts time in hundredths of a second; some frames last one of them
            longer than others, so that the whole clip lasts as long as it should.
    """
    from PIL import Image

    _check_clip(images, fps)
    sample = in_a_row(resized(pick(images, 6), min(images[0].height, 96)), gap=0)  # a palette needs no more
    palette = sample.quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=1)
    # Paper stays paper: Pillow looks colours up in steps of 4 and would take a neighbour of white.
    colours = palette.getpalette() or []
    triples = [tuple(colours[i : i + 3]) for i in range(0, len(colours), 3)]
    palette.putpalette([value for triple in triples for value in (PAPER if min(triple) > 247 else triple)])
    first, *rest = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    ends = [round(100 * (i + 1) / fps) for i in range(len(images))]
    durations = [10 * max(2, end - start) for start, end in zip([0, *ends], ends, strict=False)]
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0, disposal=1)


def require_video() -> None:
    """Raise unless an mp4 can be written here.

    Raises:
        SkipError: naming what to install.
    """
    missing = [name for name in ("imageio", "imageio_ffmpeg") if importlib.util.find_spec(name) is None]
    if missing:
        raise SkipError(
            f"writing .mp4 needs {' and '.join(missing)}: pip install 'skipguide[video]', or use .gif or .png"
        )


def save_video(images: Sequence[Image], path: str | os.PathLike[str], fps: float = 8.0) -> None:
    """Write an H.264 mp4 through diffusers and imageio.

    Raises:
        SkipError: if imageio or its ffmpeg is not installed, naming the extra that brings them.
    """
    require_video()
    from diffusers.utils import export_to_video

    _check_clip(images, fps)
    # Players want even sides. One repeated line of pixels is better than resampling the whole picture.
    export_to_video([_even(image) for image in images], str(path), fps=fps, quality=8, macro_block_size=1)


def _even(image: Image) -> Image:
    from PIL import Image

    width, height = image.width + image.width % 2, image.height + image.height % 2
    if (width, height) == image.size:
        return image
    canvas = Image.new("RGB", (width, height), PAPER)
    canvas.paste(image, (width - image.width, height - image.height))
    canvas.paste(image, (0, 0))
    return canvas


def save_frames(images: Sequence[Image], folder: str | os.PathLike[str]) -> list[Path]:
    """Write every frame as `frame_000.png` and so on; an existing file is not replaced.

    Raises:
        SkipError: if one of the files exists already.
    """
    _check_clip(images, 1.0)
    digits = max(3, len(str(len(images) - 1)))
    paths = [Path(folder) / f"frame_{i:0{digits}d}.png" for i in range(len(images))]
    if existing := [path for path in paths if path.exists()]:
        raise SkipError(f"{existing[0]} exists already: choose an empty folder")
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    return paths


def _check_clip(images: Sequence[Image], fps: float) -> None:
    if not images:
        raise SkipError("expected at least one frame; got none")
    if not (math.isfinite(fps) and fps > 0):
        raise SkipError(f"expected a positive number of frames per second; got {fps}")
