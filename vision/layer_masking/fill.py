"""Hidden positions take the mean of their known neighbours, ring by ring (arXiv 2211.14646, section 3).

Round d writes the positions at Chebyshev distance d from the visible ones and never revises them. So the weights
depend on the mask alone and are computed once, and a window of k needs at most k - 1 rounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5  # of the published code's division by the number of known neighbours


def box_sum(x: Tensor) -> Tensor:
    """Sums over 3x3 windows of `[N, C, H, W]`, zero outside."""
    if x.is_cuda or (x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()):
        return F.avg_pool2d(x, 3, 1, 1) * 9 if not x.is_cuda else F.avg_pool2d(x, 3, 1, 1, divisor_override=1)
    rows = x.clone()  # on the CPU four shifted additions are several times faster than a pooling of [N, C, H, W]
    rows[..., 1:] += x[..., :-1]
    rows[..., :-1] += x[..., 1:]
    out = rows.clone()
    out[..., 1:, :] += rows[..., :-1, :]
    out[..., :-1, :] += rows[..., 1:, :]
    return out


def fill_weights(mask: Tensor, rounds: int) -> list[Tensor]:
    """What each round multiplies the sums over 3x3 windows with.

    Args:
        mask: bool `[R, 1, H, W]`, True = visible.
        rounds: how many.

    Returns:
        One `[R, 1, H, W]` per round: 1 / (known neighbours) where the round writes, else 0.
    """
    weights = []
    small = torch.float32 if mask.is_cuda else torch.uint8  # bytes are faster to add, and CUDA's pooling has none
    for _ in range(rounds):
        count = box_sum(mask.to(small))
        known = count > 0
        weights.append((known > mask) / (count + EPS))
        mask = known
    return weights


def fill(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Fill from the known positions.

    Args:
        x: `[N, C, H, W]`, 0 where hidden.
        weights: of `fill_weights`.

    Returns:
        The same with the rings filled. No gradient flows through what is filled, as published.

    Example:
        >>> x = torch.tensor([[[[4.0, 0.0, 0.0]]]])
        >>> fill(x, fill_weights(x > 0, 2)).round(decimals=3)
        tensor([[[[4., 4., 4.]]]])
    """
    if not weights:
        return x
    if not (torch.is_grad_enabled() and x.requires_grad):
        for weight in weights:
            x = torch.addcmul(x, box_sum(x), weight)
        return x
    with torch.no_grad():
        start = x.detach()
        filled = start
        for weight in weights:
            filled = torch.addcmul(filled, box_sum(filled), weight)
        filled -= start  # visible positions keep their value, so the difference is the fill alone
    return x + filled


def fill_frame(x: Tensor, pads: Sequence[int], weights: Sequence[Tensor]) -> Tensor:
    """Fill around a rectangle of which everything is known: each round computes four lines instead of the map.

    Args:
        x: `[N, C, H, W]`.
        pads: positions to add at the top, bottom, left and right.
        weights: of `fill_weights`, for the padded map.

    Returns:
        The padded map, filled; as `fill` of `x` padded with zeros. No gradient flows through what is filled.

    Example:
        >>> x, known = torch.ones(1, 1, 2, 2), F.pad(torch.ones(1, 1, 2, 2), (2, 0, 1, 2)) > 0
        >>> fill_frame(x, (1, 2, 2, 0), fill_weights(known, 2)).round(decimals=3).unique()
        tensor([1.])
    """
    top, bottom, left, right = pads
    out = F.pad(x, (left, right, top, bottom))
    with torch.no_grad():
        for number, weight in enumerate(weights):
            edges = []
            for axis, before, after in ((-2, top, bottom), (-1, left, right)):
                for inside, step, room in ((before - number, -1, before), (number - after - 1, 1, after)):
                    if room <= number:
                        continue
                    line = out.select(axis, inside)  # the neighbours of the next line that are known
                    total = line.clone(memory_format=torch.contiguous_format)
                    total[..., 1:] += line[..., :-1]
                    total[..., :-1] += line[..., 1:]
                    edges.append((out.select(axis, inside + step), total * weight.select(axis, inside + step)))
            for edge, value in edges:  # only now: a corner belongs to two edges
                edge.copy_(value)
    return out
