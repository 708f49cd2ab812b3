"""Plan: which attention and feed-forward sublayers of a language model are left out, and when."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from torch import nn

from skipguide.config import JsonConfig, layer_tuple
from skipguide.errors import SkipError
from skipguide.plan import SkipPlan

if TYPE_CHECKING:
    from skipguide.llm.engine import AppliedSublayers

Phase = Literal["both", "prefill", "decode"]
PHASES: tuple[str, ...] = get_args(Phase)


@dataclass(frozen=True)
class SublayerPlan(JsonConfig):
    """Sublayers to leave out of a causal language model, with the factors that stand in for them.

    A left-out sublayer is `h = h * scale` on the residual stream `h [B, T, D]` (AdaSkip, arXiv 2501.02336): its norm
    and its sum are not computed either. Without a scale it is `h`, which is a layer whose output projection is zero.

    A pass is *prefill* when it has more than one token or starts a sequence, and *decode* otherwise. Attention that
    was left out once stays out for the rest of that sequence, because its keys and values do not exist: in phase
    `"prefill"` the feed-forwards run again in decode, the attention does not.

    Args:
        attn: layers whose attention is left out.
        mlp: layers whose feed-forward (or experts) is left out.
        attn_scale: layer -> factor, for layers of `attn`; 1 where none is given.
        mlp_scale: layer -> factor, for layers of `mlp`.
        phase: `"both"`, `"prefill"` or `"decode"` (the prompt is read by the whole model).

    Raises:
        SkipError: for layers that are no numbers, or named twice; for a scale that is not finite or not positive, or of
            a layer that is not left out; for an unknown phase.

    Example:
        >>> plan = SublayerPlan(attn=[6], mlp=[4, 5], mlp_scale={4: 1.02})
        >>> SublayerPlan.from_dict(plan.to_dict()) == plan
        True
    """

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

    @classmethod
    def of(cls, plan: SkipPlan, phase: Phase = "both") -> SublayerPlan:
        """A plan of the core as one of sublayers: a block is its attention and its feed-forward.

        Args:
            plan: of parts `"block"`, `"attn"` and `"mlp"`, for all rows and all steps.
            phase: see above.

        Raises:
            SkipError: for anything else.

        Example:
            >>> SublayerPlan.of(SkipPlan([1]) | SkipPlan([2], part="mlp"))
            SublayerPlan(attn=(1,), mlp=(1, 2), attn_scale={}, mlp_scale={}, phase='both')
        """
        if not isinstance(plan, SkipPlan):
            raise SkipError(f"expected a SkipPlan; got {type(plan).__name__}")
        found: dict[str, set[int]] = {"attn": set(), "mlp": set()}
        for term in plan.terms:
            if term != SkipPlan(term.layers, part=term.part) or term.part not in ("block", *found):
                raise SkipError(
                    f"expected a plan of blocks, attn and mlp, for all rows and steps, without the name of a stack; "
                    f"got {term}"
                )
            for part in found if term.part == "block" else (term.part,):
                found[part] |= set(term.layers)
        return cls(sorted(found["attn"]), sorted(found["mlp"]), phase=phase)

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

    def apply(self, model: nn.Module, *, cached: bool = True, everywhere: bool = False) -> AppliedSublayers:
        """Leave the sublayers out from now on, in this thread or task, until `remove()` or the end of the `with`.

        Args:
            model: a causal language model of a known family (`sublayer_map`), or one that can be proven on the spot.
            cached: False promises that no pass uses a KV cache; only then may a plan leave out every attention.
            everywhere: leave them out in all threads (a generation that streams from a thread of its own, a server).

        Raises:
            SkipError: for a layer that the model does not have, every attention left out, attention whose keys
                other layers read, a scale where the layers are not `h + sublayer(h)` one after the other, or a
                recurrent model. The model is as it was.
        """
        from skipguide.llm.engine import AppliedSublayers

        return AppliedSublayers(self, model, cached=cached, everywhere=everywhere)


def _pairs(scales: Any) -> Any:
    """A list of pairs as the mapping that it was; anything else is for the plan to refuse."""
    try:
        return dict(scales)
    except (TypeError, ValueError):
        return scales


def sublayer_layers(layers: Iterable[int] | int) -> tuple[int, ...]:
    """Layer numbers, checked and in order."""
    return tuple(sorted(layer_tuple(layers)))


def check_scales(scales: Mapping[int, float], layers: tuple[int, ...], part: str) -> dict[int, float]:
    """The scales in order of their layers, each checked to be a finite positive number of a layer of `layers`."""
    if not isinstance(scales, Mapping):
        raise SkipError(f"expected {part}_scale as a mapping of layers to factors; got {scales!r}")
    out = {}
    for layer in sorted(layer_tuple(scales)):
        try:
            value = float(scales[layer])
        except (TypeError, ValueError):
            raise SkipError(f"{part}_scale of layer {layer} is {scales[layer]!r}: expected a number") from None
        if not math.isfinite(value) or value <= 0:
            raise SkipError(f"{part}_scale of layer {layer} is {value}: expected a finite positive factor")
        if layer not in layers:
            raise SkipError(f"{part}_scale names layer {layer}, whose {part} is not left out (these are: {layers})")
        out[layer] = value
    return out
