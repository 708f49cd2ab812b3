"""Interventions: what happens in a layer of a language model from which sublayers are left out."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from skipguide.active import ActivePlan, Call, Intervention
from skipguide.arguments import Arguments
from skipguide.interventions import Nested, ReturnInput, SkipBlock, When, ZeroBranch
from skipguide.llm.plan_data import SublayerPlanData
from skipguide.llm.sublayers import Part, SublayerMap

# The conditions that a pass of the decoder meets or not; an extension of a plan has its own, layer by layer.
ATTN, MLP, BOTH = "attn", "mlp", "attn and mlp"


def extended_mlp(layer: int) -> str:
    """The condition that the feed-forward of a layer is left out beyond the plan."""
    return f"mlp {layer}"


def extended_layer(layer: int) -> str:
    """The condition that the whole layer is left out because its feed-forward is, beyond the plan."""
    return f"layer {layer}"


class ScaleInput:
    """The residual stream is scaled before the layer: h * scale stands for its attention (AdaSkip, section 4.2)."""

    __slots__ = ("arguments", "factor")

    def __init__(self, layer: nn.Module, factor: float) -> None:
        self.arguments = Arguments(layer)
        self.factor = factor

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the layer on the scaled stream."""
        hidden = self.arguments.get("hidden_states", args, kwargs) * self.factor
        args, kwargs = self.arguments.put({"hidden_states": hidden}, args, kwargs)
        return call(*args, **kwargs)


class ScaleOutput:
    """The residual stream is scaled after the layer: h * scale stands for its feed-forward.

    Args:
        layer: its number.
        factor: the scale; None takes the one of the sequence's extension, if it has one.
    """

    __slots__ = ("factor", "layer")

    def __init__(self, layer: int, factor: float | None) -> None:
        self.layer = layer
        self.factor = factor

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the layer and scale its stream."""
        out = call(*args, **kwargs)
        factor = plan.state.extra.get(self.layer) if self.factor is None else self.factor
        if factor is None:
            return out
        return (out[0] * factor, *out[1:]) if isinstance(out, tuple) else _scaled(out, factor)


def _scaled(out: Tensor, factor: float) -> Tensor:
    return out * factor


def interventions_at(
    layer: int, sublayers: SublayerMap, plan: SublayerPlanData, extended: bool = False
) -> list[tuple[nn.Module, Intervention]]:
    """The interventions in a layer, each with its module, the layer itself first.

    Args:
        layer: its number.
        sublayers: the model's sublayers.
        plan: what is left out.
        extended: the feed-forward is left out in some sequences beyond the plan.
    """
    parts: list[Part] = [part for part in ("attn", "mlp") if layer in getattr(plan, part)]
    mlp = MLP if "mlp" in parts else extended_mlp(layer) if extended else ""
    conditions = {"attn": ATTN if "attn" in parts else "", "mlp": mlp}
    found: list[tuple[nn.Module, Intervention]] = []
    if sublayers.layout.prenorm and (around := _around(layer, sublayers, plan, conditions)) is not None:
        found.append((sublayers.layers[layer], around))
    if len(parts) == 2 and sublayers.layout.prenorm and plan.phase == "both":
        return found  # nothing inside the layer is ever called while the plan holds
    for part, condition in conditions.items():
        if condition:
            site = sublayers.site(layer, part)  # type: ignore[arg-type]
            # Falcon adds the attention into the feed-forward's output, which therefore is memory of its own
            spread = not (sublayers.parallel and part == "mlp")
            found.append((site.module, When(condition, ZeroBranch(site.name, site.module, site.spec, spread))))
            found += [(module, When(condition, ReturnInput())) for module in site.helper_modules]
    return found


def _around(
    layer: int, sublayers: SublayerMap, plan: SublayerPlanData, conditions: dict[str, str]
) -> Intervention | None:
    """At the layer itself: the scales of what is left out, and the whole layer left out at once; None for neither."""
    found: list[Intervention] = []
    if (factor := plan.attn_scale.get(layer)) is not None:
        found.append(When(conditions["attn"], ScaleInput(sublayers.layers[layer], factor)))
    extended = conditions["mlp"] not in ("", MLP)
    if extended or layer in plan.mlp_scale:
        found.append(When(conditions["mlp"], ScaleOutput(layer, plan.mlp_scale.get(layer))))
    if all(conditions.values()):
        both = extended_layer(layer) if extended else BOTH
        found.append(When(both, SkipBlock(sublayers.blocks[layer], counted=2)))
    around: Intervention | None = None
    for each in reversed(found):
        around = each if around is None else Nested(each, around)
    return around
