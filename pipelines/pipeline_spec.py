"""How a diffusers pipeline drives its denoiser, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class PipelineSpec:
    """How one pipeline calls its denoiser.

    Args:
        cfg: `"batched"`: one call with rows [uncond, cond]; `"two_calls"`: a conditional call, then an unconditional
            one; `"named"`: like two calls, told apart by the name of the `cache_context`, and whether there is
            a second call is not known beforehand; `"guider"`: named calls driven by a guider component.
        denoisers: pipeline attributes of the denoisers; one or all may be None on a given pipeline.
        scales: for each denoiser, the pipeline attributes to read w from, the first that is not None; `()` where the
            pipeline keeps it to itself, so that only deliveries that do not need w are possible.
        dynamic: w may change after the forward (CogVideoX's use_dynamic_cfg).
        rescale: pipeline attribute of its own guidance rescale, if it has one.
        layout: how a prediction's dimensions lie: `"bcfhw"`, `"bfchw"`, `"bchw"`, or packed `"tokens"`.
        kept: what the call decides at its beginning and keeps in a local variable, so that a callback that changes the
            attribute changes nothing: `"w"`, the scale, and `"cfg"`, whether there is CFG.
        passive: keyword arguments that mark a denoiser call as the pipeline's own extra pass, which is left alone.
    """

    cfg: Literal["batched", "two_calls", "named", "guider"]
    denoisers: tuple[str, ...] = ("transformer",)
    scales: tuple[tuple[str, ...], ...] = (("_guidance_scale",),)
    dynamic: bool = False
    rescale: str = ""
    kept: tuple[Literal["w", "cfg"], ...] = ()
    passive: tuple[str, ...] = ()
    layout: Literal["bcfhw", "bfchw", "bchw", "tokens"] = "bcfhw"
