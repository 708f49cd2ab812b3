"""Masks as pictures: read from one, and painted over one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from skipguide.errors import SkipError

if TYPE_CHECKING:
    from PIL.Image import Image


def inside_of(mask: Image, name: object = "the mask") -> Tensor:
    """Bool `[H, W]`, true where a picture of a mask is at least half white.

    Args:
        mask: any mode; black outside, white inside.
        name: what to call it in an error.

    Raises:
        SkipError: for a mask of small numbers (0 and 1, or a number per object), which would read as empty.
    """
    import numpy as np

    from skipguide.media.frames import as_rgb

    values = np.asarray(as_rgb(mask, name).convert("L"))
    if 0 < values.max() < 128:
        raise SkipError(
            f"{name} has values up to {values.max()} only; expected 0 outside and 255 inside: multiply a mask of 0 and "
            "1 by 255, or compare one of numbered objects with 0"
        )
    return torch.from_numpy(values >= 128)


def overlay(image: Image, mask: Tensor, colour: tuple[int, int, int] = (220, 38, 38), opacity: float = 0.45) -> Image:
    """A picture with a mask in colour and its outline in full.

    Args:
        image: any mode; not changed.
        mask: `[H, W]` of the picture's size, true inside: bool, or 0 and 1.
        colour: of the mask.
        opacity: of its inside, 0..1.
    """
    import numpy as np
    from PIL import Image as Pillow

    if mask.dtype is not torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise SkipError(
            f"expected a mask of bool, or of 0 and 1; got {mask.dtype} from {float(mask.min()):g} to "
            f"{float(mask.max()):g}: threshold it (logits > 0)"
        )
    inside = mask.detach().cpu().bool()
    if tuple(inside.shape) != (image.height, image.width):
        raise SkipError(f"expected a mask of {image.height}x{image.width} pixels; got {tuple(inside.shape)}")
    shrunk = ~(F.max_pool2d((~inside)[None, None].float(), 3, stride=1, padding=1)[0, 0].bool())
    edge = (inside & ~shrunk).numpy()
    pixels = np.asarray(image.convert("RGB")).astype(np.float32)
    paint = np.asarray(colour, dtype=np.float32)
    pixels[inside.numpy()] = (1 - opacity) * pixels[inside.numpy()] + opacity * paint
    pixels[edge] = paint
    return Pillow.fromarray(pixels.round().astype(np.uint8))
