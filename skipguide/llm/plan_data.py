"""Plan data: which attention and feed-forward sublayers of a language model are left out, and when."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from skipguide.config import JsonConfig, layer_tuple, number
from skipguide.errors import SkipError

Phase = Literal["both", "prefill", "decode"]
PHASES: tuple[str, ...] = get_args(Phase)


@dataclass(frozen=True, repr=False)
class SublayerPlanData(JsonConfig):
    """The fields of a `SublayerPlan`, which documents them, and their checks."""

    attn: Sequence[int] = ()
    mlp: Sequence[int] = ()
    attn_scale: Mapping[int, float] = field(default_factory=dict)
    mlp_scale: Mapping[int, float] = field(default_factory=dict)
    phase: Phase = "both"

    def __post_init__(self) -> None:
        """Sort the layers, so that equal plans are equal, and check every field."""
        for part in ("attn", "mlp"):
            layers = sublayer_layers(getattr(self, part))
            object.__setattr__(self, part, layers)
            object.__setattr__(self, f"{part}_scale", check_scales(getattr(self, f"{part}_scale"), layers, part))
        if self.phase not in PHASES:
            raise SkipError(f"unknown phase {self.phase!r}; expected one of {', '.join(PHASES)}")

    def __hash__(self) -> int:
        return hash((self.attn, self.mlp, tuple(self.attn_scale.items()), tuple(self.mlp_scale.items()), self.phase))

    @property
    def empty(self) -> bool:
        """True if nothing is left out."""
        return not (self.attn or self.mlp)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; JSON has no whole numbers as keys, so that scales are lists of pairs."""
        scales = {name: [[k, v] for k, v in getattr(self, name).items()] for name in ("attn_scale", "mlp_scale")}
        return super().to_dict() | scales

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote; an unknown key or version is an error."""
        if isinstance(data, Mapping):
            data = {k: _pairs(v) if k.endswith("_scale") else v for k, v in data.items()}
        return super().from_dict(data)


def _pairs(scales: Any) -> Any:
    """A list of pairs as the mapping that it was; anything else is for the plan to refuse."""
    try:
        found = dict(scales)
    except (TypeError, ValueError):
        return scales
    return found if len(found) == len(scales) else scales


def sublayer_layers(layers: Iterable[int] | int) -> tuple[int, ...]:
    """Layer numbers, checked and in order."""
    return tuple(sorted(layer_tuple(layers)))


def check_scales(scales: Mapping[int, float], layers: tuple[int, ...], part: str) -> dict[int, float]:
    """The scales in order of their layers, each checked to be a finite positive number of a layer of `layers`."""
    if not isinstance(scales, Mapping):
        raise SkipError(f"expected {part}_scale as a mapping of layers to factors; got {scales!r}")
    out = {}
    for layer in sorted(layer_tuple(list(scales))):
        value = number(scales[layer])
        if value is None or value <= 0:
            raise SkipError(f"{part}_scale of layer {layer} is {scales[layer]!r}: expected a finite positive factor")
        if layer not in layers:
            raise SkipError(f"{part}_scale names layer {layer}, whose {part} is not left out (these are: {layers})")
        out[layer] = float(value)
    return out
