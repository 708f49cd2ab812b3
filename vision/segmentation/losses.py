"""Losses of segmentation: cross-entropy with Dice, and their mean over several heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from skipguide.errors import SkipError
from skipguide.vision.recording import is_recorded


def bce_dice_loss(logits: Tensor, target: Tensor, bce_weight: float = 0.5, smooth: float = 1e-5) -> Tensor:
    """Binary cross-entropy and Dice: `bce_weight * BCE + 1 - Dice`, Dice per image over all its classes.

    Args:
        logits: `[N, classes, H, W]`.
        target: the same shape, 0 or 1; shares between them are taken too.
        bce_weight: weight of the cross-entropy (arXiv 1807.10165, equation 2, has a half).
        smooth: keeps Dice defined where both masks are empty.

    Raises:
        SkipError: if the shapes differ, or for a target outside 0..1 or with NaN: no loss is meant by it.

    Example:
        >>> sure = torch.full((1, 1, 4, 4), 50.0)
        >>> round(bce_dice_loss(sure, torch.ones_like(sure)).item(), 6)
        0.0
    """
    if logits.shape != target.shape:
        raise SkipError(f"expected a target of shape {tuple(logits.shape)}; got {tuple(target.shape)}")
    if not is_recorded() and target.dtype is not torch.bool and not bool(((target >= 0) & (target <= 1)).all()):
        raise SkipError(
            f"expected a target from 0 (outside) to 1 (inside); got {float(target.min()):g} to "
            f"{float(target.max()):g}: divide a mask of 0 and 255 by 255, and leave unknown pixels out of the loss"
        )
    # Sums over pixels are beyond what float16 holds and bfloat16 counts.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    target = target.to(logits.dtype)
    chance, truth = logits.sigmoid().flatten(1), target.flatten(1)
    dice = (2 * (chance * truth).sum(1) + smooth) / (chance.sum(1) + truth.sum(1) + smooth)
    return bce_weight * F.binary_cross_entropy_with_logits(logits, target) + (1 - dice).mean()


def deep_supervision_loss(
    heads: Tensor | Sequence[Tensor],
    target: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor] = bce_dice_loss,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """The mean of a loss over the heads.

    Args:
        heads: logits of each head, as `UNetPlusPlus` returns them; a single tensor counts as one head.
        target: what every head should give.
        loss: of one head's logits and the target.
        weights: one per head, for a weighted mean; equal by default.

    Raises:
        SkipError: without heads, or if the weights are not one non-negative number per head with a positive sum.
    """
    heads = [heads] if isinstance(heads, Tensor) else list(heads)
    weights = [1.0] * len(heads) if weights is None else list(weights)
    if not heads or len(weights) != len(heads) or min(weights) < 0 or sum(weights) <= 0:
        raise SkipError(f"expected one weight >= 0 for each of {len(heads)} heads, not all zero; got {weights}")
    total = sum(weights)
    parts = [w / total * loss(head, target) for w, head in zip(weights, heads, strict=True) if w]
    return torch.stack(parts).sum()
