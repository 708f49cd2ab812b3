"""The search for a fixed point that all solvers share: it evaluates, counts, and keeps the best point of every row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from skipguide.errors import SkipError

Cell = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FixedPoint:
    """What a solve found.

    Attributes:
        z: the points, of the shape of the start.
        residuals: `[N]`, root mean square of f(z) - z relative to that of f(z); `[1]` for a coupled batch.
        evaluations: times f was evaluated.
        converged: whether every residual is within the tolerance.
    """

    z: Tensor
    residuals: Tensor
    evaluations: int
    converged: bool


class Done(Exception):  # noqa: N818, it ends a loop and reports nothing wrong
    """The search is over."""


class Search:
    """Counts evaluations and keeps the best point of every row, by absolute residual."""

    def __init__(self, f: Cell, start: Tensor, tol: float, budget: int, coupled: bool) -> None:
        self.f, self.shape, self.tol, self.budget = f, start.shape, tol, budget
        self.evaluations = 0
        self.start = start.reshape(1 if coupled else len(start), -1)
        self.size = torch.full_like(self.start[:, 0], torch.inf)
        self.relative = torch.full_like(self.size, torch.inf)
        self.z = self.f_of_z = self.start
        self.scale = rms(self.start)
        self.last_is_best = torch.zeros_like(self.size, dtype=torch.bool)

    def __call__(self, z: Tensor, orbit: Tensor | None = None) -> Tensor:
        """f(z) - z; ends the search when all rows have converged or the budget is spent.

        `orbit` is the smallest step so far of the orbits that z goes on with: a point that is within the tolerance and
        improves on its own orbit ends its row, as it would if there were nothing but that orbit.
        """
        raw = self.f(z.reshape(self.shape))
        if raw.shape != self.shape:
            raise SkipError(
                f"the cell maps a state of shape {tuple(self.shape)} to {tuple(raw.shape)}; expected the same"
            )
        value = raw.to(z.dtype).reshape(z.shape)
        self.evaluations += 1
        step = value - z
        size = rms(step).nan_to_num(nan=torch.inf, posinf=torch.inf)
        if self.evaluations == 1:
            if not bool(torch.isfinite(value).all()):
                raise SkipError("the cell returns NaN or infinity at its starting point: check its input and weights")
            # An equilibrium at zero is measured against the start, else its relative residual never falls.
            self.scale = 1e-3 * torch.maximum(self.scale, rms(value))
        relative = size / torch.maximum(rms(value), self.scale).clamp(min=torch.finfo(z.dtype).tiny)
        close, ended = relative <= self.tol, self.close
        better = (size < self.size) & (close | ~ended)  # a row that has ended stays so
        if orbit is not None:
            better = better | ((size < orbit) & close & ~ended)
        self.last_is_best = better
        self.size = torch.where(better, size, self.size)
        self.relative = torch.where(better, relative, self.relative)
        self.z = torch.where(better[:, None], z, self.z)
        self.f_of_z = torch.where(better[:, None], value, self.f_of_z)
        if self.evaluations >= self.budget or bool(self.close.all()):
            raise Done
        return step

    @property
    def close(self) -> Tensor:
        """`[N]`: rows that have ended."""
        return self.relative <= self.tol

    def lost(self, step: Tensor, factor: float) -> Tensor:
        """`[N]`: rows whose last point is not finite or `factor` times worse than their best."""
        return ~(rms(step) <= factor * self.size)

    def result(self) -> FixedPoint:
        """The best points; a row that ran out of budget while it improved takes the correction that is there."""
        onward = (self.last_is_best & ~self.close)[:, None]
        z = torch.where(onward, self.f_of_z, self.z)
        return FixedPoint(z.reshape(self.shape), self.relative, self.evaluations, bool(self.close.all()))


def rms(values: Tensor) -> Tensor:
    """`[N]`: the root mean square of every row."""
    return values.square().mean(1).sqrt()
