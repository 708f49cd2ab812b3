"""Rounding: how far a half-precision dtype moves what guidance delivers, noted on the device and read once a run."""

from __future__ import annotations

import torch
from torch import Tensor

from skipguide.pipelines.sampling.ledger import GuidanceStats


class Rounding:
    """The error of the guidance's term by rounding, step by step.

    Args:
        stats: the ledger that gets the mean over the steps (`GuidanceStats.rounding`).
    """

    def __init__(self, stats: GuidanceStats) -> None:
        self.stats = stats
        self._total: Tensor | None = None
        self._steps = 0
        self._noted = 0

    def note(self, delivered: Tensor, wanted: Tensor, delta: Tensor | None) -> None:
        """Note one step, without waiting for the device. In float32 there is nothing to note.

        Args:
            delivered: what the pipeline's arithmetic arrives at with what it was given.
            wanted: what it was to arrive at.
            delta: the guidance's term in it; None notes nothing.
        """
        if delivered is wanted or delta is None:
            return
        error = torch.linalg.vector_norm(delivered.float() - wanted.float())
        share = error / torch.linalg.vector_norm(delta.float()).clamp_min(torch.finfo(torch.float32).tiny)
        self._total = share if self._total is None else self._total + share
        self._noted += 1

    def settle(self) -> None:
        """Read what was noted of a run, into the ledger."""
        total, noted = self._total, self._noted
        self._total, self._noted = None, 0
        if total is None:
            return
        before = (self.stats.rounding or 0.0) * self._steps
        self._steps += noted
        self.stats.rounding = (before + float(total)) / self._steps
