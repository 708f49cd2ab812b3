"""Stats: the ledger of what ran and what was left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from skipguide.shown import Row, Shown, ledger_rows, passes


@dataclass(repr=False)
class Stats(Shown):
    """What ran while a plan was active.

    Attributes:
        calls: block or sublayer name -> times it was run, for any rows.
        rows: the same, counted in batch rows.
        skips: name -> times it was left out, for any rows.
        skipped_rows: the same, counted in batch rows.
        passes: forward passes of the model.
        passes_without: names -> passes that left out just these, where whole passes are entered instead of calls.
    """

    calls: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    skips: dict[str, int] = field(default_factory=dict)
    skipped_rows: dict[str, int] = field(default_factory=dict)
    passes: int = 0
    weights: dict[str, float] = field(default_factory=dict)
    passes_without: Counter[tuple[str, ...]] = field(default_factory=Counter)

    def ran(self, name: str, rows: int) -> None:
        """Enter one run of `name` on `rows` batch rows."""
        self.calls[name] = self.calls.get(name, 0) + 1
        self.rows[name] = self.rows.get(name, 0) + rows

    def skipped(self, name: str, rows: int) -> None:
        """Enter that `name` was left out for `rows` batch rows."""
        self.skips[name] = self.skips.get(name, 0) + 1
        self.skipped_rows[name] = self.skipped_rows.get(name, 0) + rows

    def passed_without(self, names: tuple[str, ...]) -> None:
        """Enter a whole pass in which just these were left out: one number a pass, whatever their number."""
        self.passes += 1
        self.passes_without[names] += 1

    def left_out_of_passes(self) -> Counter[str]:
        """Name -> passes that left it out, of those that were entered whole."""
        found: Counter[str] = Counter()
        for names, count in self.passes_without.items():
            found.update(dict.fromkeys(names, count))
        return found

    @property
    def skipped_fraction(self) -> float:
        """Share of the model's blocks that was left out, row by row; a sublayer is its share of its block's."""
        ran, left = self.rows, self.skipped_rows
        if not any((*ran.values(), *left.values())):  # blocks that were called without their model: no batch is known
            ran, left = self.calls, self.skips
        skipped = sum(self.weights.get(name, 1.0) * n for name, n in left.items())
        came = (*ran.items(), *left.items())
        total = sum(n for name, n in came if name not in self.weights)  # blocks: a sublayer came with its block
        return skipped / total if total else 0.0

    def _heading(self) -> str:
        return f"Stats: {passes(self.passes)}, {self.skipped_fraction:.1%} left out"

    def _rows(self) -> list[Row]:
        return ledger_rows(self.calls, self.skips)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "passes": self.passes,
            "calls": dict(self.calls),
            "rows": dict(self.rows),
            "skips": dict(self.skips),
            "skipped_rows": dict(self.skipped_rows),
            "skipped_fraction": self.skipped_fraction,
        }
