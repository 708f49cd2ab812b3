"""Segments, the parts of an image that an explanation ranks, and masks made of them."""

from __future__ import annotations

import torch
from torch import Tensor

from skipguide.errors import SkipError
from skipguide.vision.layer_masking.answers import as_segments, one_image


def grid_segments(height: int, width: int, cells: int) -> Tensor:
    """A grid of `cells` x `cells` patches.

    Returns:
        `[H, W]` whole numbers from 0 to cells² - 1.

    Raises:
        SkipError: for more cells than pixels.

    Example:
        >>> grid_segments(4, 4, 2)
        tensor([[0, 0, 1, 1],
                [0, 0, 1, 1],
                [2, 2, 3, 3],
                [2, 2, 3, 3]])
    """
    if not 1 <= cells <= min(height, width):
        raise SkipError(f"expected 1 to {min(height, width)} cells a side; got {cells}")
    rows, columns = (torch.arange(n) * cells // n for n in (height, width))
    return rows[:, None] * cells + columns


def slic_segments(image: Tensor, count: int, compactness: float = 10.0) -> Tensor:
    """Superpixels of an image (SLIC of scikit-image).

    Args:
        image: `[3, H, W]` or `[1, 3, H, W]`, any scale; it is brought to 0..1 first.
        count: about how many: SLIC is asked for more or fewer until it gives what is nearest.
        compactness: higher is more square.

    Returns:
        `[H, W]` whole numbers from 0.

    Raises:
        SkipError: without scikit-image, for another image, or fewer than one.
    """
    try:
        from skimage.segmentation import slic
    except ImportError as error:
        raise SkipError("superpixels need scikit-image: pip install 'skipguide[explain]', or use a grid") from error
    if count < 1:
        raise SkipError(f"expected at least one superpixel; got {count}")
    x = one_image(image).detach().float().cpu()
    x = (x - x.amin()) / (x.amax() - x.amin()).clamp_min(1e-6)
    pixels = x.permute(1, 2, 0).numpy()
    best, asked = None, count
    for _ in range(5):
        found = slic(pixels, n_segments=asked, compactness=compactness, start_label=0)
        got = int(found.max()) + 1
        if best is None or abs(got - count) < abs(int(best.max()) + 1 - count):
            best = found
        following = max(1, round(asked * count / got))
        if got == count or following == asked:
            break
        asked = following
    return torch.from_numpy(best).long()


def segment_masks(shown: Tensor, segments: Tensor) -> Tensor:
    """Masks from decisions per segment, on the segments' device.

    Args:
        shown: bool `[M, S]`, True = the segment is visible.
        segments: `[H, W]`, numbers below S.

    Returns:
        bool `[M, 1, H, W]`.

    Raises:
        SkipError: if a segment has no decision, or one that is neither yes nor no.
    """
    segments = as_segments(segments)
    low, high = torch.stack(segments.aminmax()).tolist()  # together: a GPU is waited for once
    if shown.ndim != 2 or segments.ndim != 2 or high >= shown.shape[1] or low < 0:
        raise SkipError(
            f"expected decisions [M, S] and segments [H, W] numbered below S; got {tuple(shown.shape)} and "
            f"{tuple(segments.shape)} from {low} to {high}"
        )
    if shown.dtype != torch.bool and not bool(((shown == 0) | (shown == 1)).all()):
        raise SkipError(
            f"expected decisions that are all 0 or 1; got {shown.dtype} with others: threshold them (> 0.5)"
        )
    return shown.to(segments.device).bool()[:, segments.long()][:, None]
