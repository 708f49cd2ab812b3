"""Frames: RGB pictures of whatever a pipeline or a file gives, which of them to show, and at what size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from skipguide.errors import SkipError

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")


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


def open_picture(path: object) -> Image:
    """The picture in a file as RGB, the way up that people see it.

    Raises:
        SkipError: for a file that is missing, damaged, no picture, or so large that Pillow takes it for an attack.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:  # type: ignore[arg-type]
            return as_rgb(opened, path)
    except Image.DecompressionBombError as error:
        raise SkipError(
            f"{path} is larger than Pillow opens ({error}): reduce it, or raise PIL.Image.MAX_IMAGE_PIXELS for a file "
            "that you trust"
        ) from error
    except (OSError, SyntaxError) as error:
        raise SkipError(f"{path} is not a readable picture: {error}") from error


def as_rgb(picture: Image, name: object = "the picture") -> Image:
    """A picture as RGB, the way up that people see it.

    Args:
        picture: of any mode.
        name: what to call it in an error.

    Raises:
        SkipError: for values beyond a byte, or floats: Pillow would cut them off at 255 without a word.
    """
    picture = upright(picture)
    if picture.mode == "F" or picture.mode.startswith("I"):
        low, high = picture.getextrema()
        if picture.mode == "F" or not 0 <= low <= high <= 255:  # type: ignore[operator]
            raise SkipError(
                f"{name} has pixels of mode {picture.mode} with values {low} to {high}; expected 0 to 255: bring it to "
                "8 bits first"
            )
    return picture.convert("RGB")


def upright(picture: Image) -> Image:
    """A picture turned as its camera noted in it (EXIF), which is how every viewer shows it."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(picture)
    except SyntaxError:  # Pillow's word for notes that are damaged; the pixels are whole
        return picture


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
    apart = _apart(left, right)
    return sum(float(each.mean()) for each in apart) / (255 * len(apart))


def in_levels(change: float) -> str:
    """A difference in words: its share of 255 grey levels.

    Example:
        >>> in_levels(0.0044)
        '1.1 of 255 levels a pixel'
    """
    return f"{255 * change:.1f} of 255 levels a pixel"


def amplified_difference(left: Sequence[Image], right: Sequence[Image]) -> tuple[list[Image], int]:
    """Where two clips of the same shape differ, bright enough to be seen.

    Returns:
        The absolute difference of every frame, and by how much it was multiplied: the power of two, up to 64, at which
        at most one value in a hundred of any frame is cut off.
    """
    import numpy as np
    from PIL import Image

    apart = _apart(left, right)
    high, factor = max(float(np.quantile(each, 0.99)) for each in apart), 1
    while factor < 64 and 0 < 2 * factor * high <= 255:
        factor *= 2
    return [Image.fromarray((each * factor).clip(0, 255).astype(np.uint8)) for each in apart], factor


def _apart(left: Sequence[Image], right: Sequence[Image]) -> list[Any]:
    import numpy as np

    if len(left) != len(right) or {i.size for i in left} != {i.size for i in right}:
        raise SkipError(f"expected two clips of the same shape; got {_shape(left)} and {_shape(right)}")
    arrays = ([np.asarray(image, dtype=np.float32) for image in clip] for clip in (left, right))
    return [np.abs(a - b) for a, b in zip(*arrays, strict=True)]


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
