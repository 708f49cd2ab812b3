"""Ledger: what guidance cost, measured and foretold. Blocks are counted per clip: one block run on one batch row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from skipguide.shown import Shown


@dataclass(repr=False)
class GuidanceStats(Shown):
    """What ran while guidance was applied.

    Attributes:
        passes: forward calls of the denoiser, whole or in part.
        blocks_run: blocks that ran, per clip.
        blocks_plain: blocks that the pipeline alone runs.
        blocks_naive: blocks that a full third pass on every step with a skipped pass runs.
        blocks_cached: blocks for which a cache answered. Inside a compiled graph nobody sees which, and they count as
            run; where a cache answers for sublayers, their blocks run.
        seconds: wall-clock seconds in skipped passes.
        delivery: `"shift"` or `"solve"`, how the guidance reaches the pipeline; `"guider"` of a `SkipGuider`.
        reuse_error: with `every` above 1, how far the difference that had been used again was from the new one when
            that was computed, relative to its norm, averaged; None if that was never seen.
        renewals: how many times it was.
        cfg_reuse_error: the same of the difference c - u, with `cfg_every`.
        cfg_renewals: how many times it was.
        rounding: with a denoiser in half precision, how far the guidance's term was moved by rounding what was
            delivered, relative to its norm and averaged over the guided steps of whole runs; None where nothing is
            rounded (a wider denoiser, a loop that takes float32) or the pipeline does not tell its CFG scale.
        batched: passes that had their skipped passes in the same batch (`tail`); their seconds are not known apart.
        rank: with `branch_parallel`, whose passes, blocks and seconds these are.
        ranks: how many share the branches of a step.
    """

    passes: int = 0
    blocks_run: int = 0
    blocks_plain: int = 0
    blocks_naive: int = 0
    seconds: float = 0.0
    delivery: str = "shift"
    reuse_error: float | None = None
    renewals: int = 0
    rounding: float | None = None
    batched: int = 0
    rank: int = 0
    ranks: int = 1
    blocks_cached: int = 0
    cfg_reuse_error: float | None = None
    cfg_renewals: int = 0

    @property
    def blocks_skipped(self) -> int:
        """Blocks that a plan left out, or that were shared with an earlier pass; with `ranks`, the others' too."""
        return self.blocks_naive - self.blocks_run - self.blocks_cached

    def note_reuse(self, old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
        """Measure what `every` cost in accuracy, at a step that has both the last difference and a new one."""
        errors = [_error(a, b) for a, b in zip(old, new, strict=True)]
        self.reuse_error = _mean(self.reuse_error, self.renewals, sum(errors) / len(errors))
        self.renewals += 1

    def note_cfg_reuse(self, old: Tensor, new: Tensor) -> None:
        """Measure what `cfg_every` cost in accuracy, likewise."""
        self.cfg_reuse_error = _mean(self.cfg_reuse_error, self.cfg_renewals, _error(old, new))
        self.cfg_renewals += 1

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"blocks_skipped": self.blocks_skipped}

    def _heading(self) -> str:
        return f"GuidanceStats: {self}"

    def __str__(self) -> str:
        if not self.blocks_plain:
            return "guidance has not run yet"
        mine = f"rank {self.rank} of {self.ranks}: " if self.ranks > 1 else ""
        return (
            f"{mine}{self.passes} passes, {self.blocks_run} blocks run ({self.blocks_run / self.blocks_plain:.2f}x the "
            f"plain pipeline; a full third pass: {self.blocks_naive / self.blocks_plain:.2f}x), "
            f"{self.seconds:.2f} s in skipped passes, delivery {self.delivery}"
            + (f", {self.blocks_cached} blocks answered by a cache" if self.blocks_cached else "")
            + (f", {self.batched} passes with skipped rows in the batch" if self.batched else "")
            + (f", rounding moves its term by {self.rounding:.1%}" if self.rounding is not None else "")
            + (f", differences used again {self.reuse_error:.0%} off when renewed" if self.renewals else "")
            + (f", c - u used again {self.cfg_reuse_error:.0%} off when renewed" if self.cfg_renewals else "")
        )


def _error(old: Tensor, new: Tensor) -> float:
    return float((old - new).norm() / new.norm().clamp_min(1e-30))


def _mean(before: float | None, count: int, value: float) -> float:
    """A mean with one value more."""
    return ((before or 0.0) * count + value) / (count + 1)


@dataclass(frozen=True, repr=False)
class GuidanceCost(Shown):
    """What guidance will cost, in blocks per clip and step.

    Attributes:
        passes_per_step: forward calls per step, partial ones as their share; averaged over the schedule.
        blocks_per_step: blocks run per step, averaged over the schedule.
        blocks_plain: blocks that the pipeline alone runs per step.
        blocks_naive: the same with a full third pass wherever there is a skipped one.
    """

    passes_per_step: float
    blocks_per_step: float
    blocks_plain: int
    blocks_naive: float

    @property
    def ratio_to_plain(self) -> float:
        """Blocks per step, relative to the pipeline alone."""
        return self.blocks_per_step / self.blocks_plain

    @property
    def ratio_to_naive(self) -> float:
        """Blocks per step, relative to a full third pass."""
        return self.blocks_per_step / self.blocks_naive

    def _heading(self) -> str:
        return (
            f"GuidanceCost: {self.passes_per_step:.3f} passes and {self.blocks_per_step:.1f} blocks a step "
            f"({self.ratio_to_plain:.2f}x the plain pipeline; a full third pass: "
            f"{self.blocks_naive / self.blocks_plain:.2f}x)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"ratio_to_plain": self.ratio_to_plain, "ratio_to_naive": self.ratio_to_naive}
