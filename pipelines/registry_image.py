"""Data only: how each image pipeline of diffusers drives its denoiser."""

from __future__ import annotations

from skipguide.pipelines.pipeline_spec import PipelineSpec

_SD3 = PipelineSpec("batched", passive=("skip_layers",), layout="bchw")

IMAGE_PIPELINES: dict[str, PipelineSpec] = {
    "StableDiffusion3Pipeline": _SD3,
    "FluxPipeline": PipelineSpec("named", scales=((),), layout="tokens"),
}
