"""Fixed points: solve z = f(z) for every row of a batch, within a budget of evaluations, and report how well it went.

Rows are separate problems: each has its own residual, history and step. A solver proposes where to look next; the
search counts, keeps the best point of every row and ends, by convergence or by the budget, whatever the cell does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from skipguide.config import as_flag, as_number, as_whole, is_one_of
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


class _Done(Exception):  # noqa: N818, it ends a loop and reports nothing wrong
    """The search is over."""


class _Search:
    """Counts evaluations and keeps the best point of every row, by absolute residual."""

    def __init__(self, f: Cell, start: Tensor, tol: float, budget: int, coupled: bool) -> None:
        self.f, self.shape, self.tol, self.budget = f, start.shape, tol, budget
        self.evaluations = 0
        self.start = start.reshape(1 if coupled else len(start), -1)
        self.size = torch.full_like(self.start[:, 0], torch.inf)
        self.relative = torch.full_like(self.size, torch.inf)
        self.z = self.f_of_z = self.start
        self.scale = _rms(self.start)
        self.last_is_best = torch.zeros_like(self.size, dtype=torch.bool)

    def __call__(self, z: Tensor) -> Tensor:
        """f(z) - z; ends the search when all rows have converged or the budget is spent."""
        raw = self.f(z.reshape(self.shape))
        if raw.shape != self.shape:
            raise SkipError(
                f"the cell maps a state of shape {tuple(self.shape)} to {tuple(raw.shape)}; expected the same"
            )
        value = raw.to(z.dtype).reshape(z.shape)
        self.evaluations += 1
        step = value - z
        size = _rms(step).nan_to_num(nan=torch.inf, posinf=torch.inf)
        if self.evaluations == 1:
            if not bool(torch.isfinite(value).all()):
                raise SkipError("the cell returns NaN or infinity at its starting point: check its input and weights")
            # An equilibrium at zero is measured against the start, else its relative residual never falls.
            self.scale = 1e-3 * torch.maximum(self.scale, _rms(value))
        better = size < self.size
        self.last_is_best = better
        self.size = torch.where(better, size, self.size)
        relative = size / torch.maximum(_rms(value), self.scale).clamp(min=torch.finfo(z.dtype).tiny)
        self.relative = torch.where(better, relative, self.relative)
        self.z = torch.where(better[:, None], z, self.z)
        self.f_of_z = torch.where(better[:, None], value, self.f_of_z)
        if self.evaluations >= self.budget or bool((self.relative <= self.tol).all()):
            raise _Done
        return step

    def lost(self, step: Tensor, factor: float) -> Tensor:
        """`[N]`: rows whose last point is not finite or `factor` times worse than their best."""
        return ~(_rms(step) <= factor * self.size)

    def result(self) -> FixedPoint:
        """The best points; a row that ran out of budget while it improved takes the correction that is there."""
        close = self.relative <= self.tol
        onward = (self.last_is_best & ~close)[:, None]
        z = torch.where(onward, self.f_of_z, self.z)
        return FixedPoint(z.reshape(self.shape), self.relative, self.evaluations, bool(close.all()))


def _rms(values: Tensor) -> Tensor:
    return values.square().mean(1).sqrt()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _picard(search: _Search, memory: int) -> NoReturn:
    """Repeat f; a row whose step is not finite goes back to its best point."""
    z = search.start
    while True:
        step = search(z)
        lost = ~torch.isfinite(step).all(1)
        if bool(lost.all()):
            raise _Done
        z = torch.where(lost[:, None], search.z, z + step)


class _Patience:
    """When a row's search runs in place, and for how many plain steps it then leaves off to extrapolate.

    Extrapolation lowers a residual's norm, and can stay for ever in a dip of it where f(z) - z is not zero. Plain
    steps go through such a dip, though the residual grows on the way. A linear problem may show nothing before the
    history spans it, hence as much patience as there is memory.
    """

    ENOUGH = 0.7

    def __init__(self, size: Tensor, memory: int) -> None:
        self.limit = max(memory, 5)
        self.reference = size.clone()
        self.waited = torch.zeros_like(size)
        self.plain = torch.zeros_like(size)
        self.next = torch.full_like(size, 16.0)

    def update(self, best: Tensor, size: Tensor, lost: Tensor) -> Tensor:
        """`[N]`: rows whose next step is a plain one, given their best and last residuals."""
        in_plain = self.plain > 0
        self.plain = torch.where(lost, 0.0, (self.plain - 1).clamp(min=0.0))
        # What counts after plain steps is progress from where they ended.
        ended = in_plain & (self.plain == 0)
        reference = torch.where(ended, torch.where(lost, best, size), self.reference)
        improved = best < self.ENOUGH * reference
        self.reference = torch.where(improved, best, reference)
        self.waited = torch.where(in_plain | improved, 0.0, self.waited + 1)
        stuck = self.waited >= self.limit
        self.plain = torch.where(stuck, self.next, self.plain)
        self.next = torch.where(stuck, 2 * self.next, self.next)
        self.waited = torch.where(stuck, 0.0, self.waited)
        return self.plain > 0


def _anderson(search: _Search, memory: int) -> NoReturn:
    """Anderson acceleration: every row extrapolates from a least-squares fit of its own last differences."""
    z = search.start
    step = search(z)
    moves: list[Tensor] = []
    changes: list[Tensor] = []
    damping = torch.ones_like(z[:, :1])
    patience = _Patience(search.size, memory)
    plain = torch.zeros_like(damping, dtype=torch.bool)
    while True:
        move = torch.where(plain, step, damping * step)
        if moves:
            # Least squares over the last differences, by normal equations with columns of length one.
            change = torch.stack(changes, 1)
            length = change.norm(dim=2, keepdim=True)
            length = torch.where(length > 0, length, 1.0)
            unit = change / length
            wide = torch.float32 if z.device.type == "mps" else torch.float64
            gram = (unit @ unit.mT).to(wide)
            ridge = 10 * torch.finfo(z.dtype).eps * torch.eye(len(moves), dtype=wide, device=z.device)
            weights = torch.linalg.solve(gram + ridge, (unit @ step[:, :, None]).to(wide)).to(z.dtype)
            move = move - (weights.mT @ (torch.stack(moves, 1) / length + damping[:, None] * unit))[:, 0]
        now = z + move
        after = search(now)
        lost = torch.where(plain, search.lost(after, 1e3)[:, None], search.lost(after, 10.0)[:, None])
        plain = patience.update(search.size, _rms(after), lost[:, 0])[:, None]
        forget = lost | plain
        moves.append(torch.where(forget, 0.0, now - z))
        changes.append(torch.where(forget, 0.0, after - step))
        if bool(forget.any()):
            # An empty history; a lost row goes back to its best point, with half the step.
            moves = [torch.where(forget, 0.0, m) for m in moves]
            changes = [torch.where(forget, 0.0, c) for c in changes]
            damping = torch.where(lost, damping / 2, damping)
        z = torch.where(lost, search.z, now)
        step = torch.where(lost, search.f_of_z - search.z, after)
        moves, changes = moves[-memory:], changes[-memory:]


def _broyden(search: _Search, memory: int) -> NoReturn:
    """Broyden's method: every row's inverse Jacobian is a sum of rank-one terms, started anew when full."""
    z = search.start
    step = search(z)
    # The inverse Jacobian of f(z) - z is -1 plus a sum of u v^T.
    us: list[Tensor] = []
    vs: list[Tensor] = []
    damping = torch.ones_like(z[:, :1])

    def inverse(vector: Tensor) -> Tensor:
        return sum((u * _dot(v, vector) for u, v in zip(us, vs, strict=True)), -vector)

    def inverse_left(vector: Tensor) -> Tensor:
        return sum((v * _dot(u, vector) for u, v in zip(us, vs, strict=True)), -vector)

    move = step
    while True:
        now = z + move
        after = search(now)
        lost = search.lost(after, 1e3)[:, None]
        change = torch.where(lost, 0.0, after - step)
        left = inverse_left(move)
        slope = _dot(left, change)
        usable = ~lost & (
            slope.abs() > torch.finfo(z.dtype).eps * _dot(left, left).sqrt() * _dot(change, change).sqrt()
        )
        us.append(torch.where(usable, (move - inverse(change)) / torch.where(usable, slope, 1.0), 0.0))
        vs.append(torch.where(usable, left, 0.0))
        if bool(lost.any()):
            us = [torch.where(lost, 0.0, u) for u in us]
            vs = [torch.where(lost, 0.0, v) for v in vs]
            damping = torch.where(lost, damping / 2, damping)
        if len(us) > memory:
            us, vs = [], []
        z = torch.where(lost, search.z, now)
        step = torch.where(lost, search.f_of_z - search.z, after)
        move = -inverse(step) * torch.where(lost, damping, 1.0)


def _ode(search: _Search, memory: int) -> NoReturn:
    """dz/dt = f(z) - z to its steady state: Bogacki and Shampine's pair of orders 3 and 2, each row at its own pace.

    The error allowed per unit of time is a share of the residual. It falls as the residual does, down to the stop
    tolerance: a fixed and looser one would keep the residual above that tolerance for ever. As both scale alike, it
    also bounds step times rate, which is what keeps stiff rows stable.
    """
    z = search.start
    slope = search(z)
    h = torch.ones_like(z[:, :1])
    tiny = torch.finfo(z.dtype).tiny
    while True:
        second = search(z + h / 2 * slope)
        third = search(z + 0.75 * h * second)
        now = z + h * (2 / 9 * slope + 1 / 3 * second + 4 / 9 * third)
        after = search(now)
        error = _rms(-5 / 72 * slope + 1 / 12 * second + 1 / 9 * third - 1 / 8 * after)
        share = (error / (0.1 * _rms(slope)).clamp(min=tiny)).nan_to_num(nan=torch.inf)[:, None]
        accept = share <= 1
        z, slope = torch.where(accept, now, z), torch.where(accept, after, slope)
        h = h * (0.9 * share.clamp(min=1e-6) ** -0.5).clamp(0.2, 5.0)
        if bool((h < 1e-8).all()):
            raise _Done


SOLVERS = {"picard": _picard, "anderson": _anderson, "broyden": _broyden, "ode": _ode}


@torch.no_grad()
def fixed_point(
    f: Cell,
    start: Tensor,
    solver: str = "anderson",
    tol: float = 1e-3,
    budget: int = 50,
    memory: int = 20,
    coupled: bool = False,
) -> FixedPoint:
    """Find z with f(z) = z, row by row.

    Args:
        f: maps a state `[N, ...]` to one of the same shape.
        start: where to begin.
        solver: "picard" (repeat f), "anderson", "broyden" or "ode" (steady state of dz/dt = f(z) - z).
        tol: largest relative residual, root mean square over a row.
        budget: evaluations of f, at least 1; the search ends there at the latest.
        memory: differences that Anderson and Broyden keep.
        coupled: the rows depend on each other (a batch norm in training): solve for all of them as one.

    Returns:
        The solution, or the best points found with `converged=False`.

    Raises:
        SkipError: for settings out of range, or a cell that is not finite at the start or changes the shape.

    Example:
        >>> found = fixed_point(torch.cos, torch.zeros(1, 1), tol=1e-6)
        >>> found.converged, round(found.z.item(), 4)
        (True, 0.7391)
    """
    tol, budget, memory = check_settings(solver, tol, budget, memory)
    coupled = as_flag("coupled", coupled)
    if not callable(f):
        raise SkipError(f"expected a function of the state; got {type(f).__name__}")
    if budget < 1:
        raise SkipError(f"expected a budget of at least one evaluation; got {budget}")
    given: Any = start
    if not isinstance(given, Tensor) or start.ndim < 1 or 0 in start.shape or not start.is_floating_point():
        got = f"{given.dtype} of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise SkipError(f"expected a start [N, ...] of floats; got {got}")
    search = _Search(f, start, tol, budget, coupled)
    try:
        SOLVERS[solver](search, memory)
    except _Done:
        return search.result()


def check_settings(solver: Any, tol: Any, budget: Any, memory: Any) -> tuple[float, int, int]:
    """Tolerance, budget and memory as Python's own; refuse settings that no solver can work with."""
    if not is_one_of(solver, SOLVERS):
        raise SkipError(f"expected a solver out of {sorted(SOLVERS)}; got {solver!r}")
    if not 0 < (share := as_number("tol", tol)) < 1:
        raise SkipError(f"expected tol, a relative tolerance, between 0 and 1; got {tol!r}")
    return share, as_whole("budget", budget, 0), as_whole("memory", memory)
