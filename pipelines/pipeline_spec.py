"""How a diffusers pipeline drives its denoiser, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class PipelineSpec:
    """How one pipeline calls its denoiser.

    Args:
        cfg: `"batched"`: one call with rows [uncond, cond]; `"two_calls"`: a conditional call, then an unconditional
            one; `"named"`: like two calls, told apart by the name of the `cache_context`, and whether there is
            a second call is not known beforehand; `"repeated"`: the same without names, where a second call within
            one step of the pipeline (`_current_timestep`) is the unconditional one; `"guider"`: named calls driven by
            a guider component.
        denoisers: pipeline attributes of the denoisers; one or all may be None on a given pipeline.
        scales: for each denoiser, the pipeline attributes to read w from, the first that is not None; `()` where the
            pipeline keeps it to itself, so that only deliveries that do not need w are possible.
        dynamic: w may change after the forward (CogVideoX's use_dynamic_cfg).
        rescale: pipeline attribute of its own guidance rescale, if it has one; of several, separated by spaces.
        layout: how a prediction's dimensions lie: `"bcfhw"`, `"bfchw"`, `"bfhwc"`, `"bchw"`, or packed `"tokens"`.
        kept: what the call decides at its beginning and keeps in a local variable, so that a callback that changes the
            attribute changes nothing: `"w"`, the scale, and `"cfg"`, whether there is CFG.
        passive: keyword arguments that mark a denoiser call as the pipeline's own extra pass, which is left alone
            (but gets the same delta, where the others are shifted).
        offset: what w is above the pipeline's scale g: 1 where it computes c + g (c - u).
        joined: where a denoiser predicts several things (video and sound), the attribute with the scale of each.
            Guidance treats them as one prediction; CFG is on if one of the scales says so.
        chunked: the pipeline goes through its steps once per chunk of the video, without a new table of timesteps.
    """

    cfg: Literal["batched", "two_calls", "named", "repeated", "guider"]
    denoisers: tuple[str, ...] = ("transformer",)
    scales: tuple[tuple[str, ...], ...] = (("_guidance_scale",),)
    dynamic: bool = False
    rescale: str = ""
    kept: tuple[Literal["w", "cfg"], ...] = ()
    passive: tuple[str, ...] = ()
    layout: Literal["bcfhw", "bfchw", "bfhwc", "bchw", "tokens"] = "bcfhw"
    offset: float = 0.0
    joined: tuple[str, ...] = ()
    chunked: bool = False

    def is_passive(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a denoiser call with these arguments is an extra pass of the pipeline's own."""
        given = (kwargs.get(name) for name in self.passive)
        return any(len(value) > 0 if hasattr(value, "__len__") else bool(value) for value in given)
