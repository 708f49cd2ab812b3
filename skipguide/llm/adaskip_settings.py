"""Settings of AdaSkip as data, and what they choose from a model's statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn

from skipguide.config import JsonConfig, normalize_fields
from skipguide.errors import SkipError
from skipguide.llm.choose import Sublayers, least_per_millisecond, most_similar
from skipguide.llm.cost import SublayerCosts, measure_costs
from skipguide.llm.plan import SublayerPlan
from skipguide.llm.similarity import SublayerStats


@dataclass(frozen=True, repr=False)
class AdaSkipSettings(JsonConfig):
    """The fields of `AdaSkip`, which documents them, their checks, and the choice."""

    skip_ratio: float | None = None
    count: int | None = None
    target_speedup: float | None = None
    phase: Literal["prefill", "decode", "both"] = "both"
    online: bool = True
    cost_aware: bool = False
    reference_compat: bool = False
    part: Literal["both", "attn", "mlp"] = "both"
    compensate: bool = True
    window: int = 20

    def __post_init__(self) -> None:
        """Check every setting, and keep numbers of any library as Python's."""
        given = {name: getattr(self, name) for name in ("skip_ratio", "count", "target_speedup")}
        if sum(value is not None for value in given.values()) != 1:
            raise SkipError(f"expected exactly one of skip_ratio, count and target_speedup; got {given}")
        normalize_fields(
            self,
            wholes={"count": 0, "window": 1},
            numbers={"skip_ratio": 0, "target_speedup": 1},
            flags=("online", "cost_aware", "reference_compat", "compensate"),
            optional=tuple(given),
        )
        if self.skip_ratio is not None and self.skip_ratio >= 1:
            raise SkipError(f"expected a skip_ratio of at least 0 and below 1; got {self.skip_ratio!r}")
        if self.phase not in ("prefill", "decode", "both"):
            raise SkipError(f'expected phase "prefill", "decode" or "both"; got {self.phase!r}')
        if self.part not in ("both", "attn", "mlp"):
            raise SkipError(f'expected part "both", "attn" or "mlp"; got {self.part!r}')
        if self.reference_compat and (self.cost_aware or self.part != "both" or not self.compensate):
            raise SkipError("the published code (reference_compat) has no cost_aware, no part and no compensate=False")

    # -- choosing -----------------------------------------------------------------------------------------------

    def choose(self, stats: SublayerStats, costs: SublayerCosts | None = None) -> Sublayers:
        """The sublayers to leave out.

        Raises:
            SkipError: for more sublayers than there are, or costs that are missing or of another model.
        """
        if not isinstance(stats, SublayerStats):
            raise SkipError(f"expected SublayerStats, as of AdaSkip.calibrate(); got {type(stats).__name__}")
        layers = stats.num_layers
        if not self.cost_aware:
            return most_similar(stats.attn_similarity, stats.mlp_similarity, self.number(layers), self.part)
        if costs is None:
            raise SkipError("cost_aware needs the times of the sublayers: pass costs=measure_costs(model, tokens)")
        if len(costs.attn_ms) != layers:
            raise SkipError(f"the costs are of {len(costs.attn_ms)} layers, the statistics of {layers}")
        share = self.skip_ratio
        if self.target_speedup is not None:
            share = costs.share_for(self.target_speedup)
        return least_per_millisecond(
            stats.attn_similarity,
            stats.mlp_similarity,
            costs.attn_ms,
            costs.mlp_ms,
            count=self.count,
            share=share,
            part=self.part,
        )

    def number(self, num_layers: int) -> int:
        """How many of the 2L sublayers are left out, where all count the same.

        Raises:
            SkipError: for a ratio above 0 that comes to less than half a sublayer: it would do nothing, silently.
        """
        total = 2 * num_layers
        if self.count is not None:
            return self.count
        if self.skip_ratio is not None:
            if (found := round(self.skip_ratio * total)) == 0 < self.skip_ratio:
                raise SkipError(
                    f"a skip_ratio of {self.skip_ratio:g} leaves none of {total} sublayers out: ask for more than "
                    f"{0.5 / total:.3g}, or give count=1"
                )
            return found
        assert self.target_speedup is not None
        return math.ceil(total * (1 - 1 / self.target_speedup) - 1e-9)

    def plan(self, stats: SublayerStats, costs: SublayerCosts | None = None) -> SublayerPlan:
        """The plan that leaves them out."""
        chosen = self.choose(stats, costs)
        scales: dict[str, dict[int, float]] = {}
        if self.compensate:
            scales = {
                "attn_scale": {layer: stats.attn_scale[layer] for layer in chosen.attn},
                "mlp_scale": {layer: stats.mlp_scale[layer] for layer in chosen.mlp},
            }
        return SublayerPlan(chosen.attn, chosen.mlp, phase="decode" if self.phase == "decode" else "both", **scales)

    def measure(self, model: nn.Module, tokens: int) -> SublayerCosts:
        """The times that `cost_aware` chooses by, at this context length."""
        return measure_costs(model, max(8, tokens), "decode" if self.phase == "decode" else "prefill")
