"""Data only: how each video pipeline of diffusers drives its denoiser."""

from __future__ import annotations

from skipguide.pipelines.pipeline_spec import PipelineSpec

_WAN = PipelineSpec(
    "two_calls",
    denoisers=("transformer", "transformer_2"),
    scales=(("_guidance_scale",), ("_guidance_scale_2", "_guidance_scale")),
    kept=("w",),
)
_LTX = PipelineSpec("batched", rescale="_guidance_rescale", layout="tokens")
_COG = PipelineSpec("batched", dynamic=True, kept=("cfg",), layout="bfchw")
_UNET = ("unet",)
_NAMED = PipelineSpec("named", scales=((),))

VIDEO_PIPELINES: dict[str, PipelineSpec] = {
    "LTXPipeline": _LTX,
    "LTXImageToVideoPipeline": _LTX,
    "WanPipeline": _WAN,
    "WanImageToVideoPipeline": _WAN,
    "CogVideoXPipeline": _COG,
    "CogVideoXImageToVideoPipeline": _COG,
    "MochiPipeline": PipelineSpec("batched"),
    "HunyuanVideoPipeline": _NAMED,
    "HunyuanVideo15Pipeline": PipelineSpec("guider", scales=((),)),
    "LattePipeline": PipelineSpec("batched", kept=("w", "cfg")),
    "StableVideoDiffusionPipeline": PipelineSpec("batched", denoisers=_UNET, layout="bfchw"),  # a scale per frame
    "AnimateDiffPipeline": PipelineSpec("batched", denoisers=_UNET, kept=("w",)),
}
