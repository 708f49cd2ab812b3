"""Data only: how the pipelines around a UNet drive it, with what stands beside it (ControlNet, T2I-Adapter)."""

from __future__ import annotations

from dataclasses import replace

from skipguide.pipelines.registry.spec import PipelineSpec

_UNET = ("unet",)
# no CFG where the scale is embedded in the denoiser (a latent consistency model)
_SD = PipelineSpec("batched", denoisers=_UNET, switch="do_classifier_free_guidance", layout="bchw", half="once")
_RESCALED = replace(_SD, rescale="_guidance_rescale")
# the last steps may be left to a refiner
_SDXL = replace(_RESCALED, timesteps="call.timesteps")
_LCM = PipelineSpec("single", denoisers=_UNET, scales=((),), layout="bchw", half="float32")
_OWN_SCALE = replace(_SD, switch="", scales=(("call.guidance_scale",),), timesteps="call.timesteps")
# what stands beside the UNet runs before it, and what it gives comes as arguments of the call that it is for
_CONTROL = replace(_SD, kept=("w",))
_XL_CONTROL = replace(_CONTROL, timesteps="call.timesteps")
_XL_CONTROL_RESCALED = replace(_XL_CONTROL, rescale="call.guidance_rescale")
_ANIMATED = replace(_CONTROL, layout="bcfhw")
_VARIANCES = replace(_OWN_SCALE, variances=True)
_KANDINSKY = replace(_VARIANCES, timesteps="call.timesteps_tensor")
_KANDINSKY22 = replace(_SD, variances=True)

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
    "StableDiffusionControlNetPipeline": _SD,
    "StableDiffusionControlNetImg2ImgPipeline": _CONTROL,
    "StableDiffusionControlNetInpaintPipeline": _CONTROL,
    "StableDiffusionXLControlNetPipeline": _XL_CONTROL,
    "StableDiffusionXLControlNetImg2ImgPipeline": _XL_CONTROL,
    "StableDiffusionXLControlNetInpaintPipeline": _XL_CONTROL_RESCALED,
    "StableDiffusionXLControlNetUnionPipeline": _XL_CONTROL,
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": _XL_CONTROL,
    "StableDiffusionXLControlNetUnionInpaintPipeline": _XL_CONTROL_RESCALED,
    "StableDiffusionAdapterPipeline": replace(_CONTROL, timesteps="call.timesteps"),
    "StableDiffusionXLAdapterPipeline": _XL_CONTROL_RESCALED,
    "AnimateDiffControlNetPipeline": _ANIMATED,
    "AnimateDiffVideoToVideoControlNetPipeline": _ANIMATED,
    "AnimateDiffSparseControlNetPipeline": _ANIMATED,
    "KandinskyPipeline": _KANDINSKY,
    "KandinskyImg2ImgPipeline": _KANDINSKY,
    "KandinskyInpaintPipeline": _KANDINSKY,
    "KandinskyV22Pipeline": _KANDINSKY22,
    "KandinskyV22Img2ImgPipeline": _KANDINSKY22,
    "KandinskyV22InpaintPipeline": _KANDINSKY22,
    "KandinskyV22ControlnetPipeline": _KANDINSKY,
    "KandinskyV22ControlnetImg2ImgPipeline": _VARIANCES,
    "IFPipeline": _VARIANCES,
    "IFImg2ImgPipeline": _VARIANCES,
    "IFInpaintingPipeline": _VARIANCES,
    "IFSuperResolutionPipeline": _VARIANCES,
    "IFImg2ImgSuperResolutionPipeline": _VARIANCES,
    "IFInpaintingSuperResolutionPipeline": _VARIANCES,
}
