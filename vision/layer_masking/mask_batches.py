"""Thousands of masks for one image: each different mask is run once, in batches that fit into memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from skipguide.errors import SkipError
from skipguide.hosts.progress import progress_bar
from skipguide.vision.layer_masking.answers import as_segments, logits_of, one_image
from skipguide.vision.layer_masking.checks import check_keep
from skipguide.vision.layer_masking.layer_mask import MaskedForward
from skipguide.vision.layer_masking.segments import segment_masks

logger = logging.getLogger(__name__)

ROWS_AT_MOST = {"cpu": 32}  # of a batch; more are no faster on a CPU, whose caches are full
LIVE = 8  # activations of the largest size that are held at once, generously


@torch.no_grad()
def many_masks(
    forward: MaskedForward,
    image: Tensor,
    masks: Tensor,
    segments: Tensor | None = None,
    *,
    batch: int | None = None,
    progress: bool | str = False,
) -> Tensor:
    """The answers to one image under many masks.

    Equal masks are answered once. Masks are sorted by the box that is visible, so that batches of small regions are
    cut to their box; and a batch is as large as memory allows, smaller ones following if it did not. The answers have
    no graph, which would hold the activations of every mask: for gradients call `forward` itself.

    Args:
        forward: of `masked_forward`.
        image: `[C, H, W]` or `[1, C, H, W]`.
        masks: bool `[M, H, W]` or `[M, 1, H, W]`; with `segments`, decisions bool `[M, S]`.
        segments: `[H, W]` whole numbers below S, of torch or NumPy.
        batch: rows of a batch; by default what memory allows.
        progress: show a bar, with this text if it is one.

    Returns:
        The logits `[M, ...]`, in the order of the masks.

    Raises:
        SkipError: for masks that do not belong to the image.

    Example:
        >>> import torch
        >>> from skipguide.vision.layer_masking import many_masks
        >>> import torchvision
        >>> from skipguide.vision import masked_forward
        >>> f = masked_forward(torchvision.models.resnet18(num_classes=3).eval())
        >>> segments = torch.arange(64).view(1, 64).expand(64, 64) // 32
        >>> shown = torch.tensor([[True, False], [True, True], [True, False]])
        >>> with torch.no_grad():
        ...     answers = many_masks(f, torch.randn(3, 64, 64), shown, segments)
        >>> answers.shape, torch.equal(answers[0], answers[2]), f.stats.rows
        (torch.Size([3, 3]), True, 2)
    """
    image = one_image(image)[None]
    segments = None if segments is None else as_segments(segments)
    if segments is not None and tuple(segments.shape) != tuple(image.shape[-2:]):
        raise SkipError(f"expected segments of size {tuple(image.shape[-2:])}; got {tuple(segments.shape)}")
    decisions = masks if segments is not None else check_keep(masks, soft=True).flatten(1)
    if decisions.ndim != 2 or decisions.shape[0] == 0:
        raise SkipError(f"expected at least one mask, [M, S]; got {tuple(decisions.shape)}")
    if segments is None and tuple(masks.shape[-2:]) != tuple(image.shape[-2:]):
        raise SkipError(f"expected masks of the image's size {tuple(image.shape[-2:])}; got {tuple(masks.shape[-2:])}")
    if batch is not None and batch < 1:
        raise SkipError(f"expected a batch of at least 1; got {batch}")
    if segments is not None:
        segment_masks(decisions, segments[:1, :1])  # refuses decisions that are none
        segment_masks(decisions[:1], segments)  # and segments without a decision
    decisions = decisions.to(image.device).bool()
    rows, places = torch.unique(decisions, dim=0, return_inverse=True)
    segments = None if segments is None else segments.to(image.device).long()
    order = _by_box(rows, segments, image.shape[-2:])
    rows = rows[order]
    # batches of the first pass are small: what an image takes is not known yet
    size = batch or min(8, _rows_that_fit(forward, image))
    answers: list[Tensor] = []
    start = 0
    text = progress if isinstance(progress, str) else "masks"
    with progress_bar(what=text, total=len(rows), unit="mask", show=bool(progress)) as bar:
        while start < len(rows):
            part = rows[start : start + size]
            keep = _masks(part, segments, image.shape[-2:])
            try:
                answers.append(logits_of(forward(keep, image)))
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                torch.cuda.empty_cache()
                size = max(1, size // 2)
                batch = size
                logger.warning("out of memory: going on with %d masks at a time", size)
                continue
            start += len(part)
            bar.update(len(part))
            size = batch or _rows_that_fit(forward, image)
    found = torch.cat(answers)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return found[back[places]]


def _masks(rows: Tensor, segments: Tensor | None, size: Sequence[int]) -> Tensor:
    return rows.view(-1, 1, *size) if segments is None else segment_masks(rows, segments)


def _by_box(rows: Tensor, segments: Tensor | None, size: Sequence[int]) -> Tensor:
    """An order in which neighbours show boxes that lie together: by the centre of what is visible."""
    height, width = size
    ys = torch.arange(height, device=rows.device, dtype=torch.float32).view(-1, 1).expand(height, width)
    xs = torch.arange(width, device=rows.device, dtype=torch.float32).expand(height, width)
    places = torch.arange(height * width, device=rows.device).view(height, width) if segments is None else segments
    count = rows.shape[1]

    def total(values: Tensor) -> Tensor:
        return torch.zeros(count, device=rows.device).index_add_(0, places.flatten(), values.flatten())

    weights = torch.stack([total(torch.ones_like(ys)), total(ys), total(xs)], 1)
    sums = torch.cat([part.float() @ weights for part in rows.split(64)])  # as floats masks of pixels are large
    area = sums[:, 0].clamp_min(1)
    # large ones first, which are not cut; the small ones along a coarse path over the image
    large = sums[:, 0] > 0.5 * height * width
    y, x = (sums[:, 1] / area * 4 / height).floor(), sums[:, 2] / area * 4 / width
    key = y * 4 + torch.where(y % 2 == 0, x, 4 - x)
    return torch.where(large, -1.0, key).argsort(stable=True)


def _rows_that_fit(forward: MaskedForward, image: Tensor) -> int:
    """How many images a batch may have, from the largest activation seen and the memory that is free."""
    device = image.device
    most = ROWS_AT_MOST.get(device.type, 1024)
    each = forward.masker.largest
    if not each:
        return min(8, most)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        free -= torch.cuda.memory_allocated(device)
    else:
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):  # not on every system
            free = 2**31
    return max(1, min(most, int(0.5 * free / (LIVE * each))))
