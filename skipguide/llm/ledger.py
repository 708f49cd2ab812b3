"""Ledger: what ran and what was left out under a sublayer plan, a view of the core's statistics."""

from __future__ import annotations

from collections import Counter
from typing import Any

from skipguide.hosts.kv_cache import is_left_out, layer_bytes
from skipguide.llm.cache import Mark
from skipguide.shown import Row, Shown, ledger_rows, passes
from skipguide.stats import Stats


class SublayerLedger(Shown):
    """What ran and what was left out under a sublayer plan.

    Passes are counted by what they left out; that it was left out is checked after every pass. A pass inside a
    compiled graph is not counted.

    Args:
        names: the names of all sublayers, in execution order.
        stats: of the active plan, in which every pass is entered with the names that it left out.

    Attributes:
        kv_bytes: bytes of keys and values in the cache of the last pass.
        kv_bytes_saved: bytes that the left-out attention would have held in it.
    """

    def __init__(self, names: tuple[str, ...], stats: Stats) -> None:
        self.names = names
        self.kv_bytes = 0
        self.kv_bytes_saved = 0
        self._stats = stats

    def note_memory(self, cache: Any, mark: Mark | None) -> None:
        """Note what a cache holds after a pass."""
        if cache is None or mark is None:
            return
        if mark.kinds is None:
            mark.kinds = _kinds(cache, mark)
        held = saved = 0
        for i, kept, gone in mark.kinds:
            size = layer_bytes(cache.layers[i])
            held += size * kept
            saved += size * gone
        self.kv_bytes, self.kv_bytes_saved = held, saved

    @property
    def passes(self) -> int:
        """Forward passes of the model under the plan."""
        return self._stats.passes

    @property
    def skips(self) -> dict[str, int]:
        """Sublayer -> times it was left out; the others are not listed."""
        skips = self._stats.left_out_of_passes()
        return {name: skips[name] for name in self.names if skips[name]}

    @property
    def calls(self) -> dict[str, int]:
        """Sublayer -> times it ran."""
        passes, skips = self.passes, self._stats.left_out_of_passes()
        return {name: passes - skips[name] for name in self.names}

    @property
    def skipped_fraction(self) -> float:
        """Share of the sublayers that was left out."""
        total = self.passes * len(self.names)
        return sum(self._stats.left_out_of_passes().values()) / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "passes": self.passes,
            "calls": self.calls,
            "skips": self.skips,
            "skipped_fraction": self.skipped_fraction,
            "kv_bytes": self.kv_bytes,
            "kv_bytes_saved": self.kv_bytes_saved,
        }

    def _heading(self) -> str:
        memory = f", {self.kv_bytes:,} bytes of keys and values, {self.kv_bytes_saved:,} saved" if self.kv_bytes else ""
        return f"SublayerLedger: {passes(self.passes)}, {self.skipped_fraction:.1%} of the sublayers left out{memory}"

    def _rows(self) -> list[Row]:
        return ledger_rows(self.calls, self.skips)


def _kinds(cache: Any, mark: Mark) -> list[tuple[int, int, int]]:
    """For each kind of layer in a cache: one that holds keys, how many do, and how many like it are left out."""
    held = [i for i, layer in enumerate(cache.layers) if not is_left_out(layer) and layer_bytes(layer)]
    if not held:
        return []
    first = {type(cache.layers[i]): i for i in reversed(held)}
    gone = Counter(cls if cls in first else type(cache.layers[held[0]]) for cls in mark.stood_for.values())
    return [(i, sum(type(cache.layers[j]) is cls for j in held), gone[cls]) for cls, i in first.items()]
