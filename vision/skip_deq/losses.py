"""What is added to the task's loss of a Skip DEQ: the distance of the guess, and a penalty on the cell's Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from skipguide.errors import SkipError
from skipguide.vision.fixed_point_search import in_float32


def skip_loss(z: Tensor, guess: Tensor, kind: Literal["l1", "mse"] = "l1", stop_gradient: bool = False) -> Tensor:
    """How far the guess is from the equilibrium (arXiv 2201.12240, section 3.2).

    Args:
        z: the equilibrium.
        guess: z0, `info.guess`.
        kind: "l1" is the mean absolute difference, "mse" the mean square.
        stop_gradient: train the guess alone. The method does not: that the equilibrium moves towards the guess is
            what shortens the solves.

    Returns:
        A scalar, in float32 at least; add it to the task loss, with weight 1 for "l1".

    Example:
        >>> skip_loss(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2)).item()
        2.0
    """
    if kind not in ("l1", "mse"):
        raise SkipError(f"expected kind 'l1' or 'mse'; got {kind!r}")
    if z.shape != guess.shape:
        raise SkipError(f"expected a guess of shape {tuple(z.shape)}; got {tuple(guess.shape)}")
    difference = in_float32(z.detach() if stop_gradient else z) - guess
    return difference.abs().mean() if kind == "l1" else difference.square().mean()


def jacobian_penalty(
    f: Callable[[Tensor, Tensor], Tensor],
    z: Tensor,
    x: Tensor,
    probes: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """An unbiased estimate of the squared Frobenius norm of df/dz, per element of z.

    Added to the loss, it keeps the solve short and stable (Bai et al., arXiv 2106.14342).

    Args:
        f: the cell, `f(z, x)`.
        z: the equilibrium; no gradient flows into it.
        x: the input.
        probes: random directions to average over.
        generator: for the directions, on z's device.

    Returns:
        A scalar, in float32 at least, with a graph to the parameters of f.

    Raises:
        SkipError: for fewer than one probe.
    """
    if probes < 1:
        raise SkipError(f"expected at least one probe; got {probes}")
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        value = f(leaf, x)
        total = in_float32(value.new_zeros(()))
        for _ in range(probes):
            probe = torch.randn(value.shape, dtype=value.dtype, device=value.device, generator=generator)
            (row,) = torch.autograd.grad(value, leaf, probe, create_graph=True, allow_unused=True)
            if row is not None:
                total = total + in_float32(row).square().sum()
    return total / (probes * z.numel())
