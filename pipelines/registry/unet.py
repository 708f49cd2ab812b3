"""Data only: how the pipelines around a UNet drive it, with what stands beside it (ControlNet, T2I-Adapter)."""

from __future__ import annotations

from dataclasses import replace

from skipguide.pipelines.registry.spec import PipelineSpec

_UNET = ("unet",)
# no CFG where the scale is embedded in the denoiser (a latent consistency model)
_SD = PipelineSpec(
    "batched", denoisers=_UNET, switch="do_classifier_free_guidance", layout="bchw", half="once"
)
_RESCALED = replace(_SD, rescale="_guidance_rescale")
# the last steps may be left to a refiner
_SDXL = replace(_RESCALED, timesteps="call.timesteps")
_LCM = PipelineSpec("single", denoisers=_UNET, scales=((),), layout="bchw", half="once")
_OWN_SCALE = replace(_SD, switch="", scales=(("call.guidance_scale",),), timesteps="call.timesteps")

UNET_PIPELINES: dict[str, PipelineSpec] = {
    "StableDiffusionPipeline": _RESCALED,
    "StableDiffusionImg2ImgPipeline": _SD,
    "StableDiffusionInpaintPipeline": _SD,
    "StableDiffusionDepth2ImgPipeline": _SD,
    "StableDiffusionImageVariationPipeline": _OWN_SCALE,
    "StableDiffusionUpscalePipeline": _OWN_SCALE,
    "StableUnCLIPPipeline": _OWN_SCALE,
    "StableUnCLIPImg2ImgPipeline": _OWN_SCALE,
    "StableDiffusionXLPipeline": _SDXL,
    "StableDiffusionXLImg2ImgPipeline": _SDXL,
    "StableDiffusionXLInpaintPipeline": _SDXL,
    "KolorsPipeline": replace(_SDXL, rescale=""),
    "KolorsImg2ImgPipeline": replace(_SDXL, rescale=""),
    "LatentConsistencyModelPipeline": _LCM,
    "LatentConsistencyModelImg2ImgPipeline": _LCM,
}
