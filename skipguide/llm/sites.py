"""Sites: what stands at a left-out sublayer, at the norms that serve it, and at its layer."""

from __future__ import annotations

from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from skipguide.active import Call, Frame, active_frames
from skipguide.arguments import Arguments
from skipguide.gate import Gate
from skipguide.llm.plan import SublayerPlan
from skipguide.llm.sublayers import Part, SublayerMap, SublayerSite
from skipguide.stats import Stats


class LMFrame(Frame):
    """The frame of a sublayer plan: what the running pass leaves out. It holds no modules.

    Attributes:
        attn_off: the planned attention is left out in this pass.
        mlp_off: the planned feed-forwards are.
        extra: further feed-forwards that are -> factor.
        hits: how many sublayers were left out in this pass.
        key: of the decoder's gate.
        thread: where it was entered. A task in another thread has it by a copy of the context.
    """

    __slots__ = ("_lost", "attn_off", "extra", "hits", "key", "mlp_off", "thread")

    def __init__(self, key: int, acts: dict[int, Any], lost: Any) -> None:
        super().__init__(None, Stats())
        self.key = key
        self.acts = acts
        self.attn_off = self.mlp_off = False
        self.extra: dict[int, float | None] = {}
        self.hits = 0
        self._lost = lost
        self.thread = get_ident()

    def saw(self, gate: Gate) -> None:
        """A gate was called; outside a pass of the decoder, the decoder's own gate must be there at least."""
        if not self.batch and gate.key != self.key:
            self._lost()

    def adopt(self, acts: dict[int, Any], lost: Any) -> None:
        """Begin to leave out, in every thread and task that this frame has reached."""
        self.acts, self._lost = acts, lost

    def close(self) -> None:
        """End the plan in this frame; the acts may be shared with other threads."""
        self.acts = {}
        super().close()


def frame_on(root: Gate) -> LMFrame | None:
    """The sublayer plan that holds on a decoder in this thread or task, or None.

    Args:
        root: the decoder's gate.
    """
    for frame in active_frames():
        if isinstance(frame, LMFrame) and frame.live and frame.key == root.key:
            return frame
    return None


class AbsentSublayer:
    """A sublayer that is left out, or runs, as the frame says."""

    __slots__ = (
        "arguments",
        "attn",
        "in_place",
        "inside",
        "layer",
        "none_outputs",
        "outputs",
        "planned",
        "width",
        "zeros",
    )

    def __init__(self, site: SublayerSite, planned: bool, parallel: bool) -> None:
        spec = site.spec
        self.layer = site.layer
        self.attn = site.part == "attn"
        self.planned = planned
        self.arguments = Arguments(site.module)
        self.outputs = spec.outputs[0]
        self.inside = spec.inside
        self.none_outputs = (None,) * spec.none_outputs
        self.width: int | None = getattr(site.module, spec.width) if spec.width else None
        self.in_place = parallel and not self.attn  # Falcon adds the attention into the feed-forward's output
        self.zeros: dict[Any, Tensor] = {}

    def __call__(self, frame: LMFrame, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the sublayer adds: nothing."""
        if self.planned:
            off = frame.attn_off if self.attn else frame.mlp_off
        else:
            off = self.layer in frame.extra
        if not off:
            return call(*args, **kwargs)
        compiling = torch.compiler.is_compiling()
        if not compiling:  # a number that changes would be another graph at every step
            frame.hits += 1
        given = args[0] if args and not self.outputs else self.arguments.get(self.outputs, args, kwargs)
        if self.inside:
            out = given
        elif self.in_place:
            out = torch.zeros_like(given)
        else:
            out = (given.new_zeros(()) if compiling else self._zero(given)).expand(
                given.shape if self.width is None else (*given.shape[:-1], self.width)
            )
        return (out, *self.none_outputs) if self.none_outputs else out

    def _zero(self, like: Tensor) -> Tensor:
        """One zero, spread out by the caller: nothing to fill, nothing to read."""
        # a tensor made in inference mode is not for autograd
        key = (like.dtype, like.device, torch.is_inference_mode_enabled())
        if (zero := self.zeros.get(key)) is None:
            zero = self.zeros[key] = like.new_zeros(())
        return zero


class ServantAct:
    """A norm whose sublayer is left out returns what it is given."""

    __slots__ = ("attn", "layer", "planned")

    def __init__(self, site: SublayerSite, planned: bool) -> None:
        self.layer = site.layer
        self.attn = site.part == "attn"
        self.planned = planned

    def __call__(self, frame: LMFrame, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pass on, or run."""
        if self.planned:
            off = frame.attn_off if self.attn else frame.mlp_off
        else:
            off = self.layer in frame.extra
        if not off:
            return call(*args, **kwargs)
        return args[0] if args else next(iter(kwargs.values()))


class LayerAct:
    """At a layer: the factors of what is left out, and the whole layer left out at once."""

    __slots__ = ("arguments", "attn", "attn_scale", "layer", "mlp", "mlp_scale", "none_outputs")

    def __init__(self, layer: int, sites: SublayerMap, plan: SublayerPlan) -> None:
        self.layer = layer
        self.arguments = Arguments(sites.layers[layer])
        self.attn = layer in plan.attn
        self.mlp = layer in plan.mlp
        self.attn_scale = plan.attn_scale.get(layer)
        self.mlp_scale = plan.mlp_scale.get(layer)
        self.none_outputs = (None,) * sites.none_outputs

    def __call__(self, frame: LMFrame, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Scale before for the attention, after for the feed-forward: exactly h * scale where a layer is serial."""
        attn = self.attn and frame.attn_off
        if self.mlp:
            mlp, mlp_scale = frame.mlp_off, self.mlp_scale
        else:
            mlp, mlp_scale = self.layer in frame.extra, frame.extra.get(self.layer)
        if not (attn or mlp):
            return call(*args, **kwargs)
        if attn and self.attn_scale is not None:
            hidden = self.arguments.get("hidden_states", args, kwargs) * self.attn_scale
            args, kwargs = self.arguments.put({"hidden_states": hidden}, args, kwargs)
        if attn and mlp:
            if not torch.compiler.is_compiling():
                frame.hits += 2
            out = self.arguments.get("hidden_states", args, kwargs)
            if self.none_outputs:
                out = (out, *self.none_outputs)
        else:
            out = call(*args, **kwargs)
        if not mlp or mlp_scale is None:
            return out
        return (out[0] * mlp_scale, *out[1:]) if isinstance(out, tuple) else out * mlp_scale


def acts_at(layer: int, sites: SublayerMap, plan: SublayerPlan, extended: bool = False) -> list[tuple[Any, Any]]:
    """What stands in a layer: module and act, the layer itself first.

    Args:
        layer: its number.
        sites: the model's sublayers.
        plan: what is left out.
        extended: the feed-forward is left out in some sequences beyond the plan.
    """
    parts: list[Part] = [part for part in ("attn", "mlp") if layer in getattr(plan, part)]
    whole = len(parts) == 2 and sites.layout.prenorm
    found: list[tuple[Any, Any]] = []
    if sites.layout.prenorm and (whole or extended or layer in plan.attn_scale or layer in plan.mlp_scale):
        found.append((sites.layers[layer], LayerAct(layer, sites, plan)))
    if whole and plan.phase == "both":
        return found  # nothing inside the layer is ever called while the plan holds
    for part in ("attn", "mlp"):
        if part in parts or (part == "mlp" and extended):
            site, planned = sites.site(layer, part), part in parts
            found.append((site.module, AbsentSublayer(site, planned, sites.parallel)))
            found += [(servant, ServantAct(site, planned)) for servant in site.helper_modules]
    return found
