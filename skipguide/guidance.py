"""Guidance: pure maths on tensors. c, u, k are the conditional, unconditional and skipped predictions.

w is the CFG scale, s the skip scale. Sources: STG, arXiv 2411.18664; CFG rescale, arXiv 2305.08891; adaptive
projected guidance, arXiv 2410.02416; CFG-Zero*, arXiv 2503.18886; TAG, arXiv 2510.04533; NAG, arXiv
2505.21179.

Everything composes by addition: a guided prediction is one of the CFG forms plus any number of skip directions, each
of which may be projected first, and the sum may be rescaled.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from skipguide.errors import SkipError

Over = Literal["sample", "batch"]


def cfg(u: Tensor, c: Tensor, w: float | Tensor) -> Tensor:
    """Classifier-free guidance: u + w (c - u); w is a number, or a tensor that broadcasts (one per frame)."""
    return u + w * (c - u)


def skip_direction(c: Tensor, k: Tensor) -> Tensor:
    """The unscaled direction away from a skipped prediction: c - k, in float32 for half-precision inputs.

    Example:
        >>> skip_direction(torch.tensor([2.0]), torch.tensor([1.5]))
        tensor([0.5000])
    """
    if c.dtype in (torch.float16, torch.bfloat16):
        c, k = c.float(), k.float()
    return c - k


def stg_direction(u: Tensor | None, c: Tensor, k: Tensor, w: float | Tensor) -> Tensor:
    """What spatiotemporal skip guidance adds to CFG, before its scale: c - k, whatever u and w are."""
    return skip_direction(c, k)


def wan_direction(u: Tensor | None, c: Tensor, k: Tensor, w: float | Tensor) -> Tensor:
    """What the STG authors' Wan code adds, before its scale: y0 - k, with y0 the CFG result, or c without CFG."""
    return skip_direction(c if u is None else cfg(u, c, w), k)


def rescale(y: Tensor, c: Tensor, amount: float, over: Over = "sample") -> Tensor:
    """Bring the standard deviation of y towards that of c: y (amount * std(c) / std(y) + 1 - amount).

    Args:
        y: the guided prediction.
        c: the conditional prediction, same shape.
        amount: 0 leaves y as it is, 1 matches the deviation fully.
        over: `"sample"` takes the deviation of each batch row, `"batch"` of the whole tensor as the STG code does.

    Raises:
        SkipError: for another `over`.
    """
    if over not in get_args(Over):
        raise SkipError(f"unknown over {over!r}; expected one of {', '.join(get_args(Over))}")
    if amount == 0:  # to the bit, and where y is constant too
        return y
    dims = tuple(range(1, y.dim())) if over == "sample" else tuple(range(y.dim()))
    deviation = y.std(dim=dims, keepdim=True)
    ratio = torch.where(deviation > 0, c.std(dim=dims, keepdim=True) / deviation, 1.0)  # a constant y stays as it is
    return y * (amount * ratio + (1 - amount))


def solve_uncond(y: Tensor, c: Tensor, w: float | Tensor) -> Tensor:
    """The u' for which u' + w (c - u') is y.

    Raises:
        SkipError: for w = 1, where the unconditional prediction has no weight.
    """
    if not isinstance(w, Tensor) and w == 1:
        raise SkipError(
            "at guidance_scale=1 the unconditional prediction has no weight: nothing can be delivered through it"
        )
    return (y - w * c) / (1 - w)


def project(d: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Split d into its part parallel to c and the rest, per batch row."""
    dims = tuple(range(1, d.dim()))
    direction = c / c.norm(p=2, dim=dims, keepdim=True).clamp_min(torch.finfo(c.dtype).tiny)
    parallel = (d * direction).sum(dim=dims, keepdim=True) * direction
    return parallel, d - parallel


def tangential_update(x: Tensor, after: Tensor, scale: float) -> Tensor:
    """A sampling step with its part tangential to the sample amplified (TAG, arXiv 2510.04533, equation 6).

    Args:
        x: the sample before the step.
        after: the sample after it, same shape.
        scale: the factor of the tangential part, per batch row; 1 leaves the step as it is.

    Returns:
        The sample after the changed step, in the dtype of `after`.

    Example:
        >>> tangential_update(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 1.0]]), 2.0)
        tensor([[0.5000, 2.0000]])
    """
    if scale == 1:
        return after
    wide = torch.promote_types(after.dtype, torch.float32)
    _, tangential = project(after.to(wide) - x.to(wide), x.to(wide))
    return (after.to(wide) + (scale - 1) * tangential).to(after.dtype)


def normalized_attention(positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float) -> Tensor:
    """Normalized attention guidance on what two texts make of attention (NAG, arXiv 2505.21179, section 3.2).

    Args:
        positive: the attention's output for the prompt, before its output projection, `[..., features]`.
        negative: the same for the negative prompt.
        scale: how far to go from the negative to the positive; 1 stays at the positive.
        tau: largest ratio of the L1 norms of the result and the positive, per token.
        alpha: weight of the result; 1 - alpha is that of the positive.

    Returns:
        The guided output, in the dtype of `positive`.

    Example:
        >>> normalized_attention(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0]), 3.0, tau=10.0, alpha=0.5)
        tensor([2., 1.])
    """
    wide = torch.promote_types(positive.dtype, torch.float32)
    z, other = positive.to(wide), negative.to(wide)
    guided: Tensor = z + (scale - 1) * (z - other)
    size, found = (torch.linalg.vector_norm(each, ord=1, dim=-1, keepdim=True) for each in (z, guided))
    limited: Tensor = guided * (tau * size / found.clamp_min(torch.finfo(wide).tiny)).clamp(max=1.0)
    return (alpha * limited + (1 - alpha) * z).to(positive.dtype)


def apg(d: Tensor, c: Tensor, eta: float | None = 0.0, norm: float | None = None) -> Tensor:
    """Adaptive projected guidance on a direction d: weaken its part along c, and bound its norm.

    Args:
        d: guidance direction, such as c - u or c - k.
        c: conditional prediction.
        eta: weight of the parallel part; 1 or None keeps it.
        norm: largest allowed norm per batch row; None is unbounded.

    Returns:
        d itself if `eta` and `norm` are None.

    Example:
        >>> d, c = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0]])
        >>> apg(d, c, eta=None), apg(d, c, eta=0.0)
        (tensor([[1., 2.]]), tensor([[0., 2.]]))
    """
    if eta is None and norm is None:
        return d
    c = c.to(d.dtype)
    if norm is not None:
        size = d.norm(p=2, dim=tuple(range(1, d.dim())), keepdim=True)
        d = d * (norm / size.clamp_min(torch.finfo(d.dtype).tiny)).clamp(max=1.0)
    parallel, orthogonal = project(d, c)
    return orthogonal + (1.0 if eta is None else eta) * parallel


def zero_star_scale(u: Tensor, c: Tensor) -> Tensor:
    """CFG-Zero*'s factor of the unconditional prediction, per batch row: <c, u> / <u, u> (its least-squares fit to c).

    Returns:
        A tensor that broadcasts against u: one number per row, in float32 for half-precision inputs.

    Example:
        >>> zero_star_scale(torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, 1.0]]))
        tensor([[2.]])
    """
    if u.dtype in (torch.float16, torch.bfloat16):
        u, c = u.float(), c.float()
    dims = tuple(range(1, u.dim()))
    size = (u * u).sum(dim=dims, keepdim=True)
    return (c * u).sum(dim=dims, keepdim=True) / size.clamp_min(torch.finfo(u.dtype).tiny)
