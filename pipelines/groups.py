"""Groups: which layers are skipped together, how strongly; constants, timetables, or chosen anew at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from skipguide.config import JsonConfig, number
from skipguide.errors import SkipError
from skipguide.parts import Perturbation
from skipguide.plan import Part, SkipPlan, check_stack
from skipguide.schedule import Timetable

CHOSEN = ("auto", "stochastic")


def check_layers(layers: Any, part: Part) -> Any:
    """Layers in their normal form: None, `"auto"`, `"stochastic"`, a tuple of numbers, or a timetable of tuples.

    Raises:
        SkipError: for anything else.
    """
    if isinstance(layers, Mapping) and "points" in layers:
        layers = Timetable.from_dict(layers)
    if isinstance(layers, Timetable):
        for value in layers.values:
            check_layers(value, part)
        return layers
    if isinstance(layers, str):
        if layers not in CHOSEN:
            raise SkipError(f"layers are block numbers, a timetable, or one of {', '.join(CHOSEN)}; got {layers!r}")
        return layers
    if layers is None:
        return None
    checked = SkipPlan(layers, part=part).layers
    if not checked:
        raise SkipError("layers is empty, so nothing would be skipped: name at least one block, or None for the preset")
    return tuple(checked)


def check_scale(scale: Any) -> Any:
    """A scale in its normal form: a finite number, or a timetable of numbers."""
    if isinstance(scale, Mapping):
        scale = Timetable.from_dict(scale)
    values = [number(value) for value in (scale.values if isinstance(scale, Timetable) else (scale,))]
    if any(value is None for value in values):
        raise SkipError(f"scale must be a finite number, or a timetable of them; got {scale!r}")
    return scale if isinstance(scale, Timetable) else values[0]


@dataclass(frozen=True)
class SkipGroup(JsonConfig):
    """Layers that are skipped together in one pass, with their own scale. Several groups add up.

    Args:
        layers: as in `SpatiotemporalSkipGuidance`; not a mapping.
        scale: s of this group.
        part: what of the layers is skipped.
        stack: count `layers` within one stack, such as Latte's `"temporal_transformer_blocks"`.
        strength: as in `SpatiotemporalSkipGuidance`; 0 is like scale 0.
        heads: likewise.
        part_options: likewise.

    Example:
        >>> space = SkipGroup([2], scale=2.0, stack="transformer_blocks")
        >>> time = SkipGroup([2], scale=0.5, stack="temporal_transformer_blocks")
        >>> SkipGroup.from_dict(space.to_dict()) == space
        True
    """

    layers: Sequence[int] | str | Timetable | None = None
    scale: float | Timetable = 1.0
    part: Part = "block"
    stack: str | None = None
    strength: float = 1.0
    heads: Sequence[int] | Mapping[int, Sequence[int]] | None = field(default=None, hash=False)
    part_options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Check everything that does not need a model."""
        object.__setattr__(self, "layers", check_layers(self.layers, self.part))
        object.__setattr__(self, "scale", check_scale(self.scale))
        for name, value in self.perturbation.fields.items():
            object.__setattr__(self, name, value)
        check_stack(self.stack)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with a version; what a part can be told is there where something is told."""
        plain = super().to_dict()
        for name in ("strength", "heads", "part_options"):
            del plain[name]
        return plain | self.perturbation.told

    @property
    def perturbation(self) -> Perturbation:
        """How the layers are weakened."""
        heads: Any = self.heads
        return Perturbation(self.part, self.strength, heads, self.part_options)

    @property
    def idle(self) -> bool:
        """Whether the scale is 0 at every step, or the strength is 0: then nothing is done."""
        if self.strength == 0:
            return True
        values = self.scale.values if isinstance(self.scale, Timetable) else (self.scale,)
        return not any(values)

    def scale_at(self, fraction: float, sigma: float | None = None) -> float:
        """The scale when this fraction of the steps is done."""
        return float(self.scale.at(fraction, sigma) if isinstance(self.scale, Timetable) else self.scale)
