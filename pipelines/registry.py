"""Data only: how each diffusers pipeline drives its denoiser. A pipeline that is not here is refused, never guessed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from skipguide.errors import SkipError


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
        passive: keyword arguments that mark a denoiser call as the pipeline's own extra pass, which is left alone.
    """

    cfg: Literal["batched", "two_calls", "named", "guider"]
    denoisers: tuple[str, ...] = ("transformer",)
    scales: tuple[tuple[str, ...], ...] = (("_guidance_scale",),)
    dynamic: bool = False
    rescale: str = ""
    passive: tuple[str, ...] = ()
    layout: Literal["bcfhw", "bfchw", "bchw", "tokens"] = "bcfhw"


_WAN = PipelineSpec(
    "two_calls",
    denoisers=("transformer", "transformer_2"),
    scales=(("_guidance_scale",), ("_guidance_scale_2", "_guidance_scale")),
)
_LTX = PipelineSpec("batched", rescale="_guidance_rescale", layout="tokens")
_COG = PipelineSpec("batched", dynamic=True, layout="bfchw")
_SD3 = PipelineSpec("batched", passive=("skip_layers",), layout="bchw")
_NAMED = PipelineSpec("named", scales=((),))

PIPELINES: dict[str, PipelineSpec] = {
    "LTXPipeline": _LTX,
    "LTXImageToVideoPipeline": _LTX,
    "WanPipeline": _WAN,
    "WanImageToVideoPipeline": _WAN,
    "CogVideoXPipeline": _COG,
    "CogVideoXImageToVideoPipeline": _COG,
    "MochiPipeline": PipelineSpec("batched"),
    "HunyuanVideoPipeline": _NAMED,
    "HunyuanVideo15Pipeline": PipelineSpec("guider", scales=((),)),
    "LattePipeline": PipelineSpec("batched"),
    "StableDiffusion3Pipeline": _SD3,
    "FluxPipeline": PipelineSpec("named", scales=((),), layout="tokens"),
}


def pipeline_spec(pipe: Any) -> PipelineSpec:
    """The entry for a pipeline's class.

    Raises:
        SkipError: for an unknown pipeline, with those that are known.
    """
    for cls in type(pipe).__mro__:
        if (spec := PIPELINES.get(cls.__name__)) is not None:
            return spec
    raise SkipError(
        f"how {type(pipe).__name__} calls its denoiser is not described, and guessing would risk silently wrong "
        f"guidance. Described pipelines: {', '.join(PIPELINES)}"
    )
