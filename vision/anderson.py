"""Anderson acceleration of a fixed-point search, with plain iteration in reserve."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from skipguide.vision.fixed_point_search import Search, rms


class Patience:
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


class Reserve:
    """The orbits of plain iteration, one a row, kept beside a solver whose first two evaluations are theirs too.

    An orbit's k-th evaluation is made by the search's evaluation 3k: from the ninth on one in three goes there.
    """

    EVERY = 3

    def __init__(self, search: Search) -> None:
        self.search = search
        self.made = 0
        self.z = search.start
        self.size = torch.full_like(search.size, torch.inf)
        self.alive = torch.ones_like(search.size, dtype=torch.bool)

    def add(self, step: Tensor) -> None:
        """Go on from the orbits' last points by their steps."""
        self.made += 1
        self.size = torch.minimum(self.size, rms(step).nan_to_num(nan=torch.inf, posinf=torch.inf))
        # Plain iteration that leaves the finite numbers goes back to its best point, and then the same way again.
        self.alive = self.alive & torch.isfinite(step).all(1)
        self.z = self.z + step

    def keep_up(self) -> None:
        """Make the orbits' next evaluation if it is due and some row may still need it."""
        if self.search.evaluations + 1 < self.EVERY * (self.made + 1):
            return
        needed = self.alive & ~self.search.close
        if bool(needed.any()):
            self.add(self.search(torch.where(needed[:, None], self.z, self.search.z), self.size))


def anderson(search: Search, memory: int) -> NoReturn:
    """Anderson acceleration: every row extrapolates from a least-squares fit of its own last differences.

    Extrapolation alone may miss what plain iteration finds, so a reserve makes a promise: a row that plain iteration
    ends within N evaluations ends here within 3N. For the first and the second evaluation are those of plain iteration
    (without history the move is the step itself), and `keep_up` makes the k-th evaluation of the plain orbit at the
    latest as evaluation 3k, k = 3, 4, ...: evaluations 9, 12, ... are there for it and the solver has the rest. The
    orbit goes on from its own points by the same sum as `_picard`, in a batch of the same shape, so it has the same
    bits, whatever extrapolation and the other rows do; and a point of it that would end the row there ends it here.
    It stops for rows that have ended or whose orbit is no longer finite, which plain iteration never ends.
    """
    z = search.start
    step = search(z)
    moves: list[Tensor] = []
    changes: list[Tensor] = []
    damping = torch.ones_like(z[:, :1])
    patience = Patience(search.size, memory)
    reserve = Reserve(search)
    reserve.add(step)
    plain = torch.zeros_like(damping, dtype=torch.bool)
    while True:
        move = torch.where(plain, step, damping * step)
        if moves:
            # Least squares over the last differences, by normal equations with columns of length one.
            change = torch.stack(changes, 1)
            length = rms(change, 2)[:, :, None] * z.shape[1] ** 0.5
            length = torch.where(length > 0, length, 1.0)
            unit = change / length
            wide = torch.float32 if z.device.type == "mps" else torch.float64
            gram = (unit @ unit.mT).to(wide)
            ridge = 10 * torch.finfo(search.dtype).eps * torch.eye(len(moves), dtype=wide, device=z.device)
            weights = torch.linalg.solve(gram + ridge, (unit @ step[:, :, None]).to(wide)).to(z.dtype)
            move = move - (weights.mT @ (torch.stack(moves, 1) / length + damping[:, None] * unit))[:, 0]
        now = search.rounded(z + move)
        reserve.keep_up()
        after = search(now)
        if not moves:
            reserve.add(after)
        lost = torch.where(plain, search.lost(after, 1e3)[:, None], search.lost(after, 10.0)[:, None])
        plain = patience.update(search.size, rms(after), lost[:, 0])[:, None]
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
