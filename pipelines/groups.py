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
Scale = float | Timetable | Mapping[str, float | Timetable]


def check_layers(layers: Any, part: Part) -> Any:
    """Layers in their normal form: None, `"auto"`, `"stochastic"`, a tuple of numbers, or a timetable of tuples.

    Raises:
        SkipError: for anything else.
    """
    if isinstance(layers, Mapping) and "points" in layers:
        layers = Timetable.from_dict(layers)
    if isinstance(layers, Timetable):
        return _check_table(layers, part)
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


def _check_table(table: Timetable, part: Part) -> Timetable:
    """A timetable of layers; some of its lists may be empty, for moments without skip guidance."""
    if not any(layers != () for layers in table.values):
        raise SkipError("every list of layers in the timetable is empty, so nothing would ever be skipped")
    for value in table.values:
        if value != ():
            check_layers(value, part)
    return table


def check_scale(scale: Any, name: str = "scale") -> Any:
    """A scale in its normal form: a finite number, a timetable of numbers, or one of these for each modality.

    Raises:
        SkipError: for anything else.
    """
    if isinstance(scale, Mapping) and "points" not in scale:
        if not scale or not all(isinstance(key, str) for key in scale):
            raise SkipError(f"a mapping of {name} names what the model predicts, such as 'video'; got {scale!r}")
        return {key: check_amount(own, f"{name} of {key}") for key, own in scale.items()}
    return check_amount(scale, name)


def check_amount(amount: Any, name: str, most: float | None = None) -> Any:
    """A finite number, or a timetable of numbers, in its normal form.

    Args:
        amount: what was given.
        name: what it is, for the error.
        most: numbers lie in 0 to this; None: anywhere.

    Raises:
        SkipError: for anything else.
    """
    if isinstance(amount, Mapping):
        amount = Timetable.from_dict(amount)
    values = [number(value) for value in values_of(amount)]
    if any(value is None for value in values):
        raise SkipError(f"{name} must be a finite number, or a timetable of them; got {amount!r}")
    if most is not None and not all(0 <= value <= most for value in values if value is not None):
        raise SkipError(f"{name} must lie in 0 to {most:g}; got {amount!r}")
    return amount if isinstance(amount, Timetable) else values[0]


def values_of(amount: Any) -> tuple[Any, ...]:
    """All values that a number, or a timetable, ever has."""
    return amount.values if isinstance(amount, Timetable) else (amount,)


def value_at(amount: Any, fraction: float, sigma: float | None = None) -> Any:
    """The value of a constant, or of a timetable, when this fraction of the steps is done."""
    return amount.at(fraction, sigma) if isinstance(amount, Timetable) else amount


@dataclass(frozen=True, repr=False)
class SkipGroup(JsonConfig):
    """Layers that are skipped together in one pass, with their own scale. Several groups add up.

    Args:
        layers: as in `SpatiotemporalSkipGuidance`; not a mapping.
        scale: s of this group: a number, a `Timetable`, or a mapping with one of these for each modality.
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
    scale: Scale = 1.0
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
        return self.strength == 0 or not any(value for scale in self.scales for value in values_of(scale))

    @property
    def scales(self) -> tuple[float | Timetable, ...]:
        """The scale of every modality; of a model with one, that one."""
        return tuple(self.scale.values()) if isinstance(self.scale, Mapping) else (self.scale,)

    @property
    def tables(self) -> tuple[Timetable, ...]:
        """What changes with the step."""
        return tuple(each for each in (self.layers, *self.scales) if isinstance(each, Timetable))

    def scale_at(self, fraction: float, sigma: float | None = None) -> float | dict[str, float]:
        """The scale when this fraction of the steps is done, or that of every modality."""
        if isinstance(self.scale, Mapping):
            return {name: float(value_at(scale, fraction, sigma)) for name, scale in self.scale.items()}
        return float(value_at(self.scale, fraction, sigma))

    def acts_at(self, fraction: float, sigma: float | None = None) -> bool:
        """Whether layers are skipped, with a scale that is not 0, when this fraction of the steps is done."""
        if self.strength == 0:
            return False
        return any(value_at(scale, fraction, sigma) for scale in self.scales) and bool(
            value_at(self.layers, fraction, sigma) != ()
        )
