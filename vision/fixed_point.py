"""Fixed points: solve z = f(z) for every row of a batch, within a budget of evaluations, and report how well it went.

Rows are separate problems: each has its own residual, history and step. A solver proposes where to look next; the
search counts, keeps the best point of every row and ends, by convergence or by the budget, whatever the cell does.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from skipguide.config import as_flag, as_number, as_whole, is_one_of
from skipguide.errors import SkipError
from skipguide.vision.anderson import anderson
from skipguide.vision.fixed_point_search import Cell, Done, FixedPoint, Search, rms


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _picard(search: Search, memory: int) -> NoReturn:
    """Repeat f; a row whose step is not finite goes back to its best point."""
    z = search.start
    while True:
        step = search(z)
        lost = ~torch.isfinite(step).all(1)
        if bool(lost.all()):
            raise Done
        z = torch.where(lost[:, None], search.z, z + step)


def _broyden(search: Search, memory: int) -> NoReturn:
    """Broyden's method: every row's inverse Jacobian is a sum of rank-one terms, started anew when full.

    It has no reserve: it may miss a fixed point that plain iteration finds.
    """
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
        now = search.rounded(z + move)
        after = search(now)
        lost = search.lost(after, 1e3)[:, None]
        change = torch.where(lost, 0.0, after - step)
        # The update is the same for both by one factor; of length one, their products stay within the floats.
        length = rms(change)[:, None]
        length = torch.where(torch.isfinite(length) & (length > 0), length, 1.0)
        change, move = change / length, (now - z) / length
        left = inverse_left(move)
        slope = _dot(left, change)
        usable = ~lost & (
            slope.abs() > torch.finfo(search.dtype).eps * _dot(left, left).sqrt() * _dot(change, change).sqrt()
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


def _ode(search: Search, memory: int) -> NoReturn:
    """dz/dt = f(z) - z to its steady state: Bogacki and Shampine's pair of orders 3 and 2, each row at its own pace.

    The error allowed per unit of time is a share of the residual. It falls as the residual does, down to the stop
    tolerance: a fixed and looser one would keep the residual above that tolerance for ever. As both scale alike, it
    also bounds step times rate, which is what keeps stiff rows stable. It has no reserve either, and may need many more
    evaluations than plain iteration.
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
        error = rms(-5 / 72 * slope + 1 / 12 * second + 1 / 9 * third - 1 / 8 * after)
        share = (error / (0.1 * rms(slope)).clamp(min=tiny)).nan_to_num(nan=torch.inf)[:, None]
        accept = share <= 1
        z, slope = torch.where(accept, now, z), torch.where(accept, after, slope)
        h = h * (0.9 * share.clamp(min=1e-6) ** -0.5).clamp(0.2, 5.0)
        if bool((h < 1e-8).all()):
            raise Done


SOLVERS = {"picard": _picard, "anderson": anderson, "broyden": _broyden, "ode": _ode}


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
        solver: "picard" (repeat f), "anderson", "broyden" or "ode" (steady state of dz/dt = f(z) - z). What "picard"
            ends within N evaluations, "anderson" ends within 3N, row by row; "broyden" and "ode" promise nothing of
            the kind.
        tol: largest relative residual, root mean square over a row; it means the same in every dtype. Half precision
            may not reach a small one: float16 holds three digits, bfloat16 two.
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
    search = Search(f, start, tol, budget, coupled)
    try:
        SOLVERS[solver](search, memory)
    except Done:
        return search.result()


def check_settings(solver: Any, tol: Any, budget: Any, memory: Any) -> tuple[float, int, int]:
    """Tolerance, budget and memory as Python's own; refuse settings that no solver can work with."""
    if not is_one_of(solver, SOLVERS):
        raise SkipError(f"expected a solver out of {sorted(SOLVERS)}; got {solver!r}")
    if not 0 < (share := as_number("tol", tol)) < 1:
        raise SkipError(f"expected tol, a relative tolerance, between 0 and 1; got {tol!r}")
    return share, as_whole("budget", budget, 0), as_whole("memory", memory)
