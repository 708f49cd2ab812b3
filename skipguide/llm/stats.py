"""Stats: the ledger of a sublayer plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from skipguide.llm import cache as kv
from skipguide.llm.families import SublayerMap
from skipguide.llm.sites import LMFrame


@dataclass
class SublayerLedger:
    """What ran and what was left out under a sublayer plan.

    Attributes:
        passes: forward passes of the model under the plan.
        kv_bytes: bytes of keys and values in the cache of the last pass.
        kv_bytes_saved: bytes that the left-out attention would have held in it.
    """

    map: SublayerMap = field(repr=False)
    passes: int = 0
    kv_bytes: int = 0
    kv_bytes_saved: int = 0
    _skips: dict[tuple[int, str], int] = field(default_factory=dict, repr=False)

    def enter(self, frame: LMFrame, cache: Any, mark: kv.Mark | None) -> None:
        """Enter a pass."""
        self.passes += 1
        for key in frame.hits:
            self._skips[key] = self._skips.get(key, 0) + 1
        if cache is not None:
            self.kv_bytes, self.kv_bytes_saved = kv.kv_bytes(cache, mark)

    @property
    def skips(self) -> dict[str, int]:
        """Sublayer -> times it was left out."""
        return {s.name: n for s in self.map.sites if (n := self._skips.get((s.layer, s.part), 0))}

    @property
    def calls(self) -> dict[str, int]:
        """Sublayer -> times it ran."""
        return {s.name: self.passes - self._skips.get((s.layer, s.part), 0) for s in self.map.sites}

    @property
    def skipped_fraction(self) -> float:
        """Share of the sublayers that was left out."""
        total = self.passes * len(self.map.sites)
        return sum(self._skips.values()) / total if total else 0.0

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
