"""Settings of normalized attention guidance: plain, checked data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from skipguide.config import JsonConfig, layer_tuple, normalize_fields
from skipguide.errors import SkipError
from skipguide.schedule import Schedule
from skipguide.shown import Shown, passes


@dataclass(repr=False)
class NagStats(Shown):
    """What normalized attention guidance did.

    Attributes:
        passes: passes of the denoiser that were guided.
        attentions: attentions in them, each of which ran for two texts.
    """

    passes: int = 0
    attentions: int = 0

    def _heading(self) -> str:
        return f"NagStats: {self}"

    def __str__(self) -> str:
        if not self.passes:
            return "guidance has not run yet"
        return f"{passes(self.passes)} guided, {self.attentions} attentions in them ran for two texts"


@dataclass(frozen=True, repr=False)
class NagSettings(JsonConfig):
    """The fields of `NormalizedAttentionGuidance`, which is these settings with `apply`.

    Raises:
        SkipError: on settings that cannot mean anything, whatever the model is.
    """

    scale: float = 5.0
    tau: float = 2.5
    alpha: float = 0.25
    layers: Sequence[int] | None = None
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        """Bring numbers to Python's own types and check their ranges."""
        normalize_fields(self, numbers={"scale": 1, "tau": 0, "alpha": 0})
        if self.tau == 0 or self.alpha > 1:
            raise SkipError(f"tau is above 0 and alpha 0 to 1; got tau={self.tau!r}, alpha={self.alpha!r}")
        if self.layers is not None:
            object.__setattr__(self, "layers", layer_tuple(self.layers))
        window = Schedule(self.start, self.stop)
        object.__setattr__(self, "start", window.start)
        object.__setattr__(self, "stop", window.stop)
