"""Stats: what ran of the passes that a pipeline makes, and which of them were taken up from an earlier one."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from threading import Lock
from typing import Any

from skipguide.shown import Row, Shown

_LOCK = Lock()  # threads may run one denoiser at the same time


@dataclass(repr=False)
class ReuseStats(Shown):
    """What ran while `PrefixReuse` was applied. Blocks are counted in batch rows: one block run on one row is one.

    Attributes:
        passes: forward calls of the denoiser, whole or in part.
        blocks_run: blocks that ran.
        blocks_plain: blocks that the pipeline alone runs.
        blocks_cached: blocks for which a cache answered; where it answers for sublayers, their blocks run.
        sublayers_reused: sublayers inside blocks that ran, whose results were taken from an earlier pass.
        reused: kind of pass -> how many of them began where they differ from an earlier pass, or from other rows.
        not_reused: kind of pass and why -> how many of them ran whole.
    """

    passes: int = 0
    blocks_run: int = 0
    blocks_plain: int = 0
    sublayers_reused: int = 0
    reused: Counter[str] = field(default_factory=Counter)
    not_reused: Counter[str] = field(default_factory=Counter)
    blocks_cached: int = 0

    @property
    def blocks_shared(self) -> int:
        """Blocks whose results were taken from an earlier pass, or from other rows."""
        return self.blocks_plain - self.blocks_run - self.blocks_cached

    @property
    def share(self) -> float:
        """Blocks that ran, as a share of those that the pipeline alone runs; 1 before anything ran."""
        return self.blocks_run / self.blocks_plain if self.blocks_plain else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        counts = {"reused": dict(self.reused), "not_reused": dict(self.not_reused)}
        return asdict(self) | counts | {"share": self.share, "blocks_shared": self.blocks_shared}

    def _heading(self) -> str:
        return str(self).split(";")[0]

    def _rows(self) -> list[Row]:
        kinds = [("pass", "began where it differs", "ran whole"), *((kind, n, "") for kind, n in self.reused.items())]
        return [*kinds, *((what, "", n) for what, n in self.not_reused.items())] if len(kinds) > 1 else []

    def __str__(self) -> str:
        if not self.passes:
            return "the denoiser has not run yet"
        words = [f"{self.passes} passes, {self.blocks_run} of {self.blocks_plain} block rows run ({self.share:.1%})"]
        words += [f"{self.blocks_cached} answered by a cache"] if self.blocks_cached else []
        words += [f"{count} x {kind} from where it differs" for kind, count in sorted(self.reused.items())]
        words += [f"{count} x {what}" for what, count in sorted(self.not_reused.items())]
        if not self.reused and not self.not_reused:
            words.append("no pass was a variant of another")
        return "; ".join(words)


def enter_pass(stats: ReuseStats, blocks: int, plain: int, sublayers: int = 0, cached: int = 0) -> None:
    """Enter one pass.

    Args:
        stats: the ledger.
        blocks: that ran, in batch rows.
        plain: those that the pipeline alone runs.
        sublayers: whose results were taken from an earlier pass.
        cached: blocks that a cache answered for.
    """
    with _LOCK:
        stats.passes += 1
        stats.blocks_run += blocks
        stats.blocks_plain += plain
        stats.sublayers_reused += sublayers
        stats.blocks_cached += cached


def enter_reuse(stats: ReuseStats, kind: str) -> None:
    """Enter that a pass of a kind began where it differs."""
    with _LOCK:
        stats.reused[kind] += 1


def enter_whole(stats: ReuseStats, kind: str, why: str) -> None:
    """Enter that a pass of a kind ran whole, and why."""
    with _LOCK:
        stats.not_reused[f"{kind} whole: {why}"] += 1
