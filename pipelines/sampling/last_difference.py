"""Last difference: c - u of an earlier step, in place of an unconditional pass.

CFG is c + (w - 1)(c - u), and c - u changes slowly from step to step. Where a step reuses it, u is taken to be c less
the last difference that was computed: whatever is made of u and c goes on as if the pass had run.
"""

from __future__ import annotations

from torch import Tensor

from skipguide.pipelines.sampling.ledger import GuidanceStats
from skipguide.pipelines.sampling.pipeline_call import PipelineCall
from skipguide.pipelines.sampling.predictions import widened


class LastDifference:
    """The difference of one denoiser; it is kept in the pipeline call's state.

    Args:
        denoiser: its name.
        used: whether some step uses a difference again; else none is kept.
        state: of the pipeline's call.
        stats: the ledger.
    """

    def __init__(self, denoiser: str, used: bool, state: PipelineCall, stats: GuidanceStats) -> None:
        self.denoiser = denoiser
        self.used = used
        self.state = state
        self.stats = stats

    def _key(self, clips: int) -> str:
        return f"{self.denoiser} {self.state.shape} {clips}"

    def holds(self, clips: int) -> bool:
        """Whether there is one of this denoiser, for as many clips of the same size."""
        return self.state.difference is not None and self.state.difference_of == self._key(clips)

    def keep(self, u: Tensor, c: Tensor) -> None:
        """Take over the difference of a step that ran both passes, and measure what the one before it was off."""
        if self.used:
            new = widened(c) - widened(u)
            if self.holds(len(c)) and self.state.difference is not None:
                self.stats.note_cfg_reuse(self.state.difference, new)
            self.state.difference, self.state.difference_of = new, self._key(len(c))

    def uncond(self, c: Tensor) -> Tensor:
        """The unconditional prediction that belongs to c, wide."""
        assert self.state.difference is not None
        return widened(c) - self.state.difference
