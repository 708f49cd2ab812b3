"""Numbered: a picture with the borders and the numbers of its segments, so that a number can be found in it."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

MOST = 150  # segments that are all numbered; of more only those that rank first
PALE, INK, FIRST = 0.45, (24, 24, 27), (190, 18, 60)


def number_segments(picture: Image, segments: Tensor, first: Collection[int], size: int = 11) -> Image:
    """The picture, pale, with its segments' borders and numbers.

    Args:
        picture: of any size.
        segments: `[H, W]` numbers, of the same proportions.
        first: those that rank first, written in red.
        size: of the letters in pixels.
    """
    from PIL import Image, ImageDraw

    from skipguide.media.fonts import legible

    pale = Image.blend(picture.convert("RGB"), Image.new("RGB", picture.size, "white"), PALE)
    parts = _enlarged(segments, picture.height, picture.width)
    edge = torch.zeros_like(parts, dtype=torch.bool)
    edge[1:] |= parts[1:] != parts[:-1]
    edge[:, 1:] |= parts[:, 1:] != parts[:, :-1]
    lines = Image.fromarray((edge * 255).byte().numpy())
    pale.paste((113, 113, 122), (0, 0), lines)
    draw = ImageDraw.Draw(pale)
    count = int(parts.max()) + 1
    for number in range(count):
        if count <= MOST or number in first:
            text, font = legible(str(number), size)
            draw.text(_middle(parts == number), text, fill=FIRST if number in first else INK, font=font, anchor="mm")
    return pale


def _enlarged(segments: Tensor, height: int, width: int) -> Tensor:
    rows = torch.arange(height) * segments.shape[0] // height
    columns = torch.arange(width) * segments.shape[1] // width
    return segments.cpu().long()[rows][:, columns]


def _middle(inside: Tensor) -> tuple[int, int]:
    """The pixel of a region that is nearest to its centre; a segment may be bent around that."""
    places = inside.nonzero().float()
    if len(places) == 0:  # smaller than a pixel of the picture
        return -100, -100
    row, column = places[(places - places.mean(0)).square().sum(1).argmin()].tolist()
    return int(column), int(row)
