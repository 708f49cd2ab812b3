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
        residuals: `[N]`, root mean square of f(z) - z relative to that of f(z), at `measured`; `[1]` for a coupled
            batch. In float32 at least, whatever the dtype of the state.
        evaluations: times f was evaluated.
        converged: whether every residual is within the tolerance.
        measured: the points that `residuals` belong to: z itself, but for rows that ran out of budget while they
            improved, whose z is f of the last point and has not been measured.
    """

    z: Tensor
    residuals: Tensor
    evaluations: int
    converged: bool
    measured: Tensor


class Done(Exception):  # noqa: N818, it ends a loop and reports nothing wrong
    """The search is over."""


class Search:
    """Counts evaluations and keeps the best point of every row, by absolute residual.

    The solvers compute in float32 at least: half precision cannot hold the square of a residual, nor a step that is
    small beside its point. The cell alone sees the dtype of the start, so every point is one that this dtype holds.
    """

    def __init__(self, f: Cell, start: Tensor, tol: float, budget: int, coupled: bool) -> None:
        self.f, self.shape, self.tol, self.budget = f, start.shape, tol, budget
        self.dtype = start.dtype
        self.evaluations = 0
        self.start = in_float32(start.reshape(1 if coupled else len(start), -1))
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
        z = self.rounded(z)
        raw = self.f(z.reshape(self.shape).to(self.dtype))
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

    def rounded(self, z: Tensor) -> Tensor:
        """The points that the cell's dtype holds, nearest to some."""
        return z if z.dtype == self.dtype else z.to(self.dtype).to(z.dtype)

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
        z, measured = (
            values.reshape(self.shape).to(self.dtype) for values in (torch.where(onward, self.f_of_z, self.z), self.z)
        )
        return FixedPoint(z, self.relative, self.evaluations, bool(self.close.all()), measured)


def in_float32(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def rms(values: Tensor, dim: int = 1) -> Tensor:
    """The root mean square along a dimension, in float32 at least, and of any size that the result itself has.

    >>> [f"{size:.3g}" for size in rms(torch.tensor([[3e20, 4e20], [3e-30, 4e-30]])).tolist()]
    ['3.54e+20', '3.54e-30']
    """
    wide = in_float32(values)
    # Squares of what float32 holds are beyond it, above and below.
    largest = wide.abs().amax(dim, keepdim=True)
    unit = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)
    return ((wide / unit).square().mean(dim, keepdim=True).sqrt() * unit).squeeze(dim)


def relative_residual(value: Tensor, z: Tensor, coupled: bool = False) -> Tensor:
    """`[N]` (`[1]` if coupled): the size of f(z) - z relative to f(z), of f's value at z."""
    rows = 1 if coupled else len(z)
    wide, point = (in_float32(v.detach()).reshape(rows, -1) for v in (value, z))
    return rms(wide - point) / rms(wide).clamp(min=torch.finfo(wide.dtype).tiny)
