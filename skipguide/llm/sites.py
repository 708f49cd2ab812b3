"""Sites: what stands at a left-out sublayer, at the norms that serve it, and at its layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skipguide.acts import Arguments
from skipguide.gate import Call, Frame, Gate
from skipguide.llm.families import SublayerMap, SublayerSite
from skipguide.llm.plan import SublayerPlan
from skipguide.stats import Stats


class LMFrame(Frame):
    """The frame of a sublayer plan: what the running pass leaves out.

    Attributes:
        attn_off: the planned attention is left out in this pass.
        mlp_off: the planned feed-forwards are.
        extra: further feed-forwards that are -> factor.
        hits: (layer, part) of what was left out in this pass.
    """

    __slots__ = ("attn_off", "extra", "hits", "mlp_off")

    def __init__(self, root: Gate, acts: dict[int, Any]) -> None:
        super().__init__(root, Stats())
        self.acts = acts
        self.attn_off = self.mlp_off = False
        self.extra: dict[int, float | None] = {}
        self.hits: list[tuple[int, str]] = []

    def close(self) -> None:
        """End the plan in this frame; the acts may be shared with other threads."""
        self.acts = {}
        super().close()


def zero_like(like: Tensor, width: int | None = None) -> Tensor:
    """Zeros in the shape of `like`, without the memory: nobody writes into them."""
    shape = like.shape if width is None else (*like.shape[:-1], width)
    return like.new_zeros(()).expand(shape)


class AbsentSublayer:
    """A sublayer that is left out, or runs, as the frame says."""

    __slots__ = ("arguments", "attn", "in_place", "inside", "layer", "nothings", "outputs", "planned", "width")

    def __init__(self, site: SublayerSite, planned: bool, add_in_place: bool) -> None:
        spec = site.spec
        self.layer = site.layer
        self.attn = site.part == "attn"
        self.planned = planned
        self.arguments = Arguments(site.module)
        self.outputs = spec.outputs[0]
        self.inside = spec.inside
        self.nothings = (None,) * spec.nothings
        self.width: int | None = getattr(site.module, spec.width) if spec.width else None
        self.in_place = add_in_place and not self.attn  # Falcon adds the attention into the feed-forward's output

    def off(self, frame: LMFrame) -> bool:
        """Whether the running pass leaves the sublayer out."""
        if self.planned:
            return frame.attn_off if self.attn else frame.mlp_off
        return self.layer in frame.extra

    def __call__(self, frame: LMFrame, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the sublayer adds: nothing."""
        if not self.off(frame):
            return call(*args, **kwargs)
        if not torch.compiler.is_compiling():
            frame.hits.append((self.layer, "attn" if self.attn else "mlp"))
        given = self.arguments.get(self.outputs, args, kwargs)
        if self.inside:
            out = given
        elif self.in_place:
            out = torch.zeros_like(given)
        else:
            out = zero_like(given, self.width)
        return (out, *self.nothings) if self.nothings else out


class ServantAct:
    """A norm whose sublayer is left out returns what it is given."""

    __slots__ = ("attn", "layer", "planned")

    def __init__(self, site: SublayerSite, planned: bool) -> None:
        self.layer = site.layer
        self.attn = site.part == "attn"
        self.planned = planned

    def __call__(self, frame: LMFrame, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pass on, or run."""
        off = (frame.attn_off if self.attn else frame.mlp_off) if self.planned else self.layer in frame.extra
        if not off:
            return call(*args, **kwargs)
        return args[0] if args else next(iter(kwargs.values()))


class LayerAct:
    """At a layer: the factors of what is left out, and the whole layer left out at once."""

    __slots__ = ("arguments", "attn", "attn_scale", "layer", "mlp", "mlp_scale", "nothings", "prenorm")

    def __init__(self, layer: int, sites: SublayerMap, plan: SublayerPlan) -> None:
        self.layer = layer
        self.arguments = Arguments(sites.layers[layer])
        self.attn = layer in plan.attn
        self.mlp = layer in plan.mlp
        self.attn_scale = plan.attn_scale.get(layer)
        self.mlp_scale = plan.mlp_scale.get(layer)
        self.prenorm = sites.layout.prenorm
        self.nothings = (None,) * sites.layout.nothings

    @property
    def useful(self) -> bool:
        """Whether there is anything to do at the layer itself."""
        return self.prenorm

    def __call__(self, frame: LMFrame, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Scale before for the attention, after for the feed-forward: exactly h * scale where a layer is serial."""
        attn = self.attn and frame.attn_off
        mlp = frame.mlp_off if self.mlp else self.layer in frame.extra
        attn_scale = self.attn_scale if attn else None
        mlp_scale = (self.mlp_scale if self.mlp else frame.extra[self.layer]) if mlp else None
        if not (attn and mlp) and attn_scale is None and mlp_scale is None:
            return call(*args, **kwargs)
        hidden = self.arguments.get("hidden_states", args, kwargs)
        if attn_scale is not None:
            hidden = hidden * attn_scale
            args, kwargs = self.arguments.put({"hidden_states": hidden}, args, kwargs)
        if attn and mlp:
            if not torch.compiler.is_compiling():
                frame.hits += ((self.layer, "attn"), (self.layer, "mlp"))
            if mlp_scale is not None:
                hidden = hidden * mlp_scale
            return (hidden, *self.nothings) if self.nothings else hidden
        out = call(*args, **kwargs)
        if mlp_scale is None:
            return out
        return (out[0] * mlp_scale, *out[1:]) if isinstance(out, tuple) else out * mlp_scale
