"""Images larger than memory: a model runs over tiles, and their overlaps are blended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from skipguide.errors import SkipError
from skipguide.hosts.progress import progress_bar


@torch.no_grad()
def predict_tiled(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    tile: int = 512,
    overlap: int = 64,
    batch: int = 1,
    *,
    progress: bool = False,
) -> Tensor:
    """Run a model over large images tile by tile and blend the overlaps.

    Args:
        model: maps `[n, C, h, w]` to `[n, classes, h, w]`, for example `lambda x: net(x, head=2)`.
        images: `[N, C, H, W]`; an image within one tile runs whole.
        tile: side of a tile in pixels.
        overlap: pixels that neighbours share; their weights fall linearly towards a tile's border.
        batch: tiles per call.
        progress: show a bar; an image within one tile has none.

    Returns:
        `[N, classes, H, W]`.

    Raises:
        SkipError: unless `0 <= overlap <= tile / 2` and `batch >= 1`, or if the model changes the size.

    Example:
        >>> images = torch.rand(1, 1, 20, 30)
        >>> torch.allclose(predict_tiled(lambda x: 2 * x, images, tile=8, overlap=4), 2 * images)
        True
    """
    if tile < 1 or not 0 <= overlap <= tile // 2 or batch < 1:
        raise SkipError(f"expected 0 <= overlap <= tile / 2 and batch >= 1; got {overlap=}, {tile=}, {batch=}")
    if images.ndim != 4 or len(images) == 0:
        raise SkipError(f"expected images [N, C, H, W], at least one; got {tuple(images.shape)}")
    height, width = images.shape[-2:]
    tops, lefts = _starts(height, tile, overlap), _starts(width, tile, overlap)
    h, w = min(tile, height), min(tile, width)
    ramp_y, ramp_x = _ramp(h, overlap, images), _ramp(w, overlap, images)
    weight = ramp_y[:, None] * ramp_x
    if len(tops) == len(lefts) == 1:
        return _run_tiles(model, images)
    places = [(n, y, x) for n in range(len(images)) for y in tops for x in lefts]
    total: Tensor | None = None
    weights = weight.new_zeros(height, width)
    for y in tops:
        for x in lefts:
            weights[y : y + h, x : x + w] += weight
    for at in progress_bar(range(0, len(places), batch), "tiles", show=progress):
        some = places[at : at + batch]
        out = _run_tiles(model, torch.stack([images[n, :, y : y + h, x : x + w] for n, y, x in some]))
        if total is None:
            total = out.new_zeros(len(images), out.shape[1], height, width)
        for (n, y, x), one in zip(some, out, strict=True):
            total[n, :, y : y + h, x : x + w] += one * weight
    assert total is not None
    return (total / weights).to(total.dtype)


def _run_tiles(model: Callable[[Tensor], Tensor], tiles: Tensor) -> Tensor:
    out: Any = model(tiles)
    if not isinstance(out, Tensor) or out.ndim != 4 or out.shape[-2:] != tiles.shape[-2:]:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        height, width = tiles.shape[-2:]
        raise SkipError(f"expected the model to return one tensor [n, classes, {height}, {width}]; got {got}")
    return out


def _starts(side: int, tile: int, overlap: int) -> list[int]:
    if side <= tile:
        return [0]
    return [*range(0, side - tile, tile - overlap), side - tile]


def _ramp(length: int, overlap: int, like: Tensor) -> Tensor:
    dtype = like.dtype if like.is_floating_point() else torch.float32  # of bytes the model makes floats
    place = torch.arange(length, device=like.device, dtype=dtype)
    edge = torch.minimum(place, place.flip(0)) + 1
    return (edge / (overlap + 1)).clamp(max=1)
