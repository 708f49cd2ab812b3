"""Movies: clips as files that play, or as one file per frame."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from skipguide.errors import SkipError
from skipguide.media.frames import pick, resized
from skipguide.media.sheets import PAPER, in_a_row

if TYPE_CHECKING:
    from PIL.Image import Image


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
    # A white background stays white: Pillow looks colours up in steps of 4 and would take a neighbour of white.
    colours = palette.getpalette() or []
    triples = [tuple(colours[i : i + 3]) for i in range(0, len(colours), 3)]
    palette.putpalette([value for triple in triples for value in (PAPER if min(triple) > 247 else triple)])
    first, *rest = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    ends = [round(100 * (i + 1) / fps) for i in range(len(images))]
    durations = [10 * max(2, end - start) for start, end in zip([0, *ends], ends, strict=False)]
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0, disposal=1)


def save_webp(images: Sequence[Image], path: str | os.PathLike[str], fps: float = 8.0) -> None:
    """Write a looping WebP without loss: `open_webp` gives the same pixels back, and browsers play it.

    Args:
        images: the frames.
        path: the file.
        fps: frames per second, at most 1000: a WebP counts time in thousandths of a second.

    Raises:
        SkipError: if Pillow was built without WebP.
    """
    _check_clip(images, fps)
    _require_webp()
    first, *rest = images
    durations = [max(1, end - start) for start, end in pairwise(_starts(len(images), fps))]
    first.save(path, format="WEBP", save_all=True, append_images=rest, duration=durations, loop=0, lossless=True)


def open_webp(path: str | os.PathLike[str], count: int, fps: float) -> list[Image]:
    """The frames that `save_webp` wrote. Equal frames after each other are one in the file, which lasts longer.

    Args:
        path: the file.
        count: how many frames were written.
        fps: as it was written.

    Raises:
        SkipError: for a file that is damaged, or of another clip.
    """
    from PIL import Image, ImageSequence

    _require_webp()
    found: list[Image.Image] = []
    starts, ends = _starts(count, fps), 0
    try:
        with Image.open(path) as movie:
            for frame in ImageSequence.Iterator(movie):
                picture = frame.convert("RGB")
                ends += int(frame.info.get("duration", 0))
                while len(found) < count and starts[len(found)] < ends:
                    found.append(picture)
            if getattr(movie, "n_frames", 1) == 1:  # one picture, or a clip that stands still, has no duration
                return [picture] * count
    except (OSError, SyntaxError) as error:
        raise SkipError(f"{path} is not a readable clip: {error}") from error
    if len(found) != count:
        raise SkipError(f"expected {count} frames at {fps:g} fps in {path}; got {len(found)}")
    return found


def _starts(count: int, fps: float) -> list[int]:
    """When every frame begins, and the last ends, in milliseconds."""
    return [round(1000 * number / fps) for number in range(count + 1)]


def _require_webp() -> None:
    from PIL import features

    if not features.check("webp"):
        raise SkipError(
            "this Pillow was built without WebP: pip install --force-reinstall pillow brings one that has it"
        )


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
