"""Stats: the ledger of a sublayer plan."""

from __future__ import annotations

from collections import Counter
from typing import Any

from skipguide.hosts.kv_cache import is_left_out
from skipguide.llm.cache import Mark
from skipguide.llm.plan import SublayerPlan
from skipguide.llm.sites import LMFrame

Key = tuple[int, str]


class SublayerLedger:
    """What ran and what was left out under a sublayer plan.

    Passes are counted by what they left out; that it was left out is checked after every pass. A pass inside a
    compiled graph is not counted.

    Attributes:
        kv_bytes: bytes of keys and values in the cache of the last pass.
        kv_bytes_saved: bytes that the left-out attention would have held in it.
    """

    def __init__(self, names: dict[Key, str], plan: SublayerPlan) -> None:
        self.names = names
        self.plan = plan
        self.kv_bytes = 0
        self.kv_bytes_saved = 0
        self._passes: Counter[tuple[bool, bool, tuple[int, ...]]] = Counter()

    def expected(self, frame: LMFrame) -> int:
        """How many sublayers the running pass leaves out."""
        attn = len(self.plan.attn) if frame.attn_off else 0
        return attn + (len(self.plan.mlp) if frame.mlp_off else 0) + len(frame.extra)

    def enter(self, frame: LMFrame, cache: Any, mark: Mark | None) -> None:
        """Enter a pass."""
        self._passes[frame.attn_off, frame.mlp_off, tuple(frame.extra)] += 1
        if cache is not None:
            if mark is not None and mark.kinds is None:
                mark.kinds = _kinds(cache, mark)
            if mark is not None and mark.kinds is not None:
                sizes = [(_size(cache.layers[i]), held, gone) for i, held, gone in mark.kinds]
                self.kv_bytes = sum(size * held for size, held, _ in sizes)
                self.kv_bytes_saved = sum(size * gone for size, _, gone in sizes)

    @property
    def passes(self) -> int:
        """Forward passes of the model under the plan."""
        return sum(self._passes.values())

    def _left_out(self) -> Counter[Key]:
        skips: Counter[Key] = Counter()
        for (attn, mlp, extra), count in self._passes.items():
            out = [(i, "attn") for i in self.plan.attn if attn] + [(i, "mlp") for i in self.plan.mlp if mlp]
            skips.update(dict.fromkeys([*out, *((i, "mlp") for i in extra)], count))
        return skips

    @property
    def skips(self) -> dict[str, int]:
        """Sublayer -> times it was left out; the others are not listed."""
        skips = self._left_out()
        return {name: skips[key] for key, name in self.names.items() if skips[key]}

    @property
    def calls(self) -> dict[str, int]:
        """Sublayer -> times it ran."""
        passes, skips = self.passes, self._left_out()
        return {name: passes - skips[key] for key, name in self.names.items()}

    @property
    def skipped_fraction(self) -> float:
        """Share of the sublayers that was left out."""
        total = self.passes * len(self.names)
        return sum(self._left_out().values()) / total if total else 0.0

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

    def __repr__(self) -> str:
        return f"SublayerLedger({', '.join(f'{k}={v!r}' for k, v in self.to_dict().items() if k != 'calls')})"


def _kinds(cache: Any, mark: Mark) -> list[tuple[int, int, int]]:
    """For each kind of layer in a cache: one that holds keys, how many do, and how many like it are left out."""
    held = [i for i, layer in enumerate(cache.layers) if not is_left_out(layer) and _size(layer)]
    if not held:
        return []
    first = {type(cache.layers[i]): i for i in reversed(held)}
    gone = Counter(cls if cls in first else type(cache.layers[held[0]]) for cls in mark.stood_for.values())
    return [(i, sum(type(cache.layers[j]) is cls for j in held), gone[cls]) for cls, i in first.items()]


def _size(layer: Any) -> int:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    return 0 if keys is None or values is None else keys.nbytes + values.nbytes
