"""Guidance: pure maths on tensors. c, u, k are the conditional, unconditional and skipped predictions.

w is the CFG scale, s the skip scale. Sources: STG, arXiv 2411.18664; CFG rescale, arXiv 2305.08891; adaptive
projected guidance, arXiv 2410.02416; CFG-Zero*, arXiv 2503.18886; autoguidance, arXiv 2406.02507.

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


def skip_delta(c: Tensor, k: Tensor, s: float) -> Tensor:
    """What skip guidance adds to any prediction: s (c - k), in float32 for half-precision inputs.

    Example:
        >>> skip_delta(torch.tensor([2.0]), torch.tensor([1.5]), 2.0)
        tensor([1.])
    """
    if c.dtype in (torch.float16, torch.bfloat16):
        c, k = c.float(), k.float()
    return s * (c - k)


def stg(u: Tensor, c: Tensor, k: Tensor, w: float, s: float) -> Tensor:
    """Spatiotemporal skip guidance with CFG: u + w (c - u) + s (c - k)."""
    return cfg(u, c, w) + skip_delta(c, k, s)


def wan_delta(u: Tensor, c: Tensor, k: Tensor, w: float, s: float) -> Tensor:
    """What the STG authors' Wan code adds to CFG: s (y0 - k), y0 the CFG result, k skipped with the negative prompt."""
    return skip_delta(cfg(u, c, w), k, s)


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


def apg(d: Tensor, c: Tensor, eta: float = 0.0, norm: float | None = None) -> Tensor:
    """Adaptive projected guidance on a direction d: weaken its part along c, and bound its norm.

    Args:
        d: guidance direction, such as c - u or c - k.
        c: conditional prediction.
        eta: weight of the parallel part; 1 leaves the direction as it is.
        norm: largest allowed norm per batch row; None is unbounded.
    """
    if norm is not None:
        size = d.norm(p=2, dim=tuple(range(1, d.dim())), keepdim=True)
        d = d * (norm / size.clamp_min(torch.finfo(d.dtype).tiny)).clamp(max=1.0)
    parallel, orthogonal = project(d, c)
    return orthogonal + eta * parallel


def with_momentum(d: Tensor, average: Tensor | None, beta: float) -> Tensor:
    """The running direction of adaptive projected guidance: d + beta times the one before (negative beta pushes apart).

    Args:
        d: direction of this step.
        average: what this function returned at the step before; None at the first.
        beta: momentum; -0.5 in the paper, 0 is none.
    """
    return d if average is None or beta == 0 else d + beta * average


def skip_direction(c: Tensor, k: Tensor, eta: float | None = None, norm: float | None = None) -> Tensor:
    """The unscaled direction of skip guidance, c - k, projected if `eta` or `norm` is given.

    Args:
        c: conditional prediction.
        k: prediction without the layers.
        eta: weight of the part along c (see `apg`); None with `norm` None leaves the direction as it is.
        norm: largest norm per batch row.

    Example:
        >>> c, k = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, -2.0]])
        >>> skip_direction(c, k), skip_direction(c, k, eta=0.0)
        (tensor([[1., 2.]]), tensor([[0., 2.]]))
    """
    d = skip_delta(c, k, 1.0)
    if eta is None and norm is None:
        return d
    return apg(d, c.to(d.dtype), 1.0 if eta is None else eta, norm)


def zero_star_scale(u: Tensor, c: Tensor) -> Tensor:
    """CFG-Zero*'s factor of the unconditional prediction, per batch row: <c, u> / |u|^2 (its least-squares fit to c).

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


def cfg_zero_star(u: Tensor, c: Tensor, w: float, *, zero: bool = False) -> Tensor:
    """CFG-Zero*: a u + w (c - a u) with a from `zero_star_scale`; `zero` is its zero-init of the first steps."""
    return torch.zeros_like(c) if zero else cfg(zero_star_scale(u, c) * u, c, w)


def autoguidance(c: Tensor, weak: Tensor, w: float) -> Tensor:
    """Autoguidance: weak + w (c - weak), both conditional; the weak model may be the same one without some layers."""
    return cfg(weak, c, w)
