"""Settings of self-speculative decoding, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from skipguide.config import JsonConfig, check_keys, normalize_fields
from skipguide.errors import SkipError
from skipguide.llm.cost import SublayerCosts
from skipguide.llm.plan import SublayerPlan
from skipguide.llm.similarity import SublayerStats
from skipguide.plan import SkipPlan


@dataclass(frozen=True, repr=False)
class SelfSpeculativeSettings(JsonConfig):
    """The fields of `SelfSpeculative`, which documents them, and their checks."""

    stats: SublayerStats | None = None
    plan: SublayerPlan | None = None
    costs: SublayerCosts | None = None
    draft_skip: float = 0.5
    max_draft: int = 10
    adaptive: bool = True
    confidence_exit: bool = True
    lookup: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be drafted with, and keep numbers of any library as Python's."""
        given: Any = self.plan
        if isinstance(given, SkipPlan):
            object.__setattr__(self, "plan", SublayerPlan.of(given))
        for name, kind in _PARTS.items():
            if not isinstance(value := getattr(self, name), (kind, type(None))):
                raise SkipError(f"expected {name} as a {kind.__name__} or None; got {type(value).__name__}")
        normalize_fields(self, {"max_draft": 1}, {"draft_skip": None}, ("adaptive", "confidence_exit", "lookup"))
        if not 0 < self.draft_skip < 1:
            raise SkipError(f"expected draft_skip above 0 and below 1; got {self.draft_skip!r}")
        if self.plan is not None and self.plan.empty:
            raise SkipError("the plan leaves nothing out: the drafter would be the full model")
        if self.plan is not None and self.stats is not None:
            raise SkipError("give either the drafter's plan, or statistics to choose it from; not both")

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the sublayers' time, what the drafters that can be tried leave out: `draft_skip` first, then less."""
        return tuple(share * self.draft_skip for share in (1.0, 0.7, 0.4)) if self.adaptive else (self.draft_skip,)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with a version."""
        return super().to_dict() | {
            name: value.to_dict() if (value := getattr(self, name)) is not None else None for name in _PARTS
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote; an unknown key or version is an error."""
        check_keys(data, {field.name for field in fields(cls)}, f"a {cls.__name__}")
        parts = {name: kind.from_dict(data[name]) for name, kind in _PARTS.items() if data.get(name) is not None}
        return super().from_dict({**data, **parts})


_PARTS: dict[str, Any] = {"stats": SublayerStats, "plan": SublayerPlan, "costs": SublayerCosts}
