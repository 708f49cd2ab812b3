"""Data only: how each image pipeline of diffusers drives its denoiser."""

from __future__ import annotations

from dataclasses import replace

from skipguide.pipelines.registry.spec import PipelineSpec

_SD3 = PipelineSpec(
    "batched",
    passive=("skip_layers",),
    native="skip_layers",
    native_off=(("skip_guidance_layers", None),),
    layout="bchw",
    half="once",
)
_BATCHED = PipelineSpec("batched", layout="bchw", half="once")
_KEPT = replace(_BATCHED, kept=("w",))  # its CFG reads the argument, not the attribute
_PIXART = replace(_BATCHED, scales=(("call.guidance_scale",),), variances=True)
_TWO_CALLS = PipelineSpec("two_calls", layout="bchw")
_TOKENS = replace(_TWO_CALLS, layout="tokens")
# guidance-distilled, with another CFG on top where there is a negative prompt
_TRUE_CFG = replace(_TOKENS, scales=(("call.true_cfg_scale",),), switch="call.do_true_cfg")
_QWEN = replace(_TRUE_CFG, rescale="always")  # brings the result to the norm of c
_DISTILLED = PipelineSpec("single", scales=((),), layout="tokens", half="once")  # whatever the scale
_KLEIN = replace(_TOKENS, switch="do_classifier_free_guidance", kept=("w",))
_CHROMA = replace(_TOKENS, kept=("w",))
_ZIMAGE = PipelineSpec(
    "batched",
    switch="call.apply_cfg",
    rescale="_cfg_normalization",
    offset=1.0,
    cond_first=True,
    layout="bcfhw",
    half="float32",
)

IMAGE_PIPELINES: dict[str, PipelineSpec] = {
    "StableDiffusion3Pipeline": _SD3,
    "StableDiffusion3Img2ImgPipeline": _SD3,
    "StableDiffusion3InpaintPipeline": _SD3,
    "FluxPipeline": _TRUE_CFG,
    "FluxImg2ImgPipeline": _TRUE_CFG,
    "FluxInpaintPipeline": _TRUE_CFG,
    "FluxKontextPipeline": _TRUE_CFG,
    "FluxKontextInpaintPipeline": _TRUE_CFG,
    "FluxControlPipeline": _DISTILLED,
    "FluxControlImg2ImgPipeline": _DISTILLED,
    "FluxControlInpaintPipeline": _DISTILLED,
    "FluxFillPipeline": _DISTILLED,
    "Flux2Pipeline": _DISTILLED,
    "Flux2KleinPipeline": _KLEIN,
    "Flux2KleinInpaintPipeline": _KLEIN,
    "QwenImagePipeline": _QWEN,
    "QwenImageImg2ImgPipeline": _QWEN,
    "QwenImageInpaintPipeline": _QWEN,
    # what the ControlNet adds between the blocks comes as arguments of the call that it is for
    "FluxControlNetPipeline": _TRUE_CFG,
    "FluxControlNetImg2ImgPipeline": _DISTILLED,
    "FluxControlNetInpaintPipeline": _DISTILLED,
    "StableDiffusion3ControlNetPipeline": _BATCHED,
    "StableDiffusion3ControlNetInpaintingPipeline": _BATCHED,
    "QwenImageEditPipeline": _QWEN,
    "QwenImageEditPlusPipeline": _QWEN,
    "QwenImageEditInpaintPipeline": _QWEN,
    "QwenImageLayeredPipeline": replace(_QWEN, rescale="call.cfg_normalize"),
    "QwenImageControlNetPipeline": _QWEN,
    "QwenImageControlNetInpaintPipeline": _QWEN,
    "HunyuanDiTControlNetPipeline": replace(_KEPT, rescale="_guidance_rescale", variances=True),
    "SanaControlNetPipeline": replace(_KEPT, half="float32"),
    "CogView4ControlPipeline": _TWO_CALLS,
    "LongCatImageEditPipeline": _TOKENS,
    "BriaFiboPipeline": replace(_BATCHED, kept=("cfg",), layout="tokens"),
    "BriaFiboEditPipeline": replace(_BATCHED, kept=("cfg",), layout="tokens"),
    "SanaSprintImg2ImgPipeline": replace(_DISTILLED, layout="bchw", half="float32"),
    "VisualClozeGenerationPipeline": _DISTILLED,
    "DiTPipeline": replace(_PIXART, cond_first=True),
    "PRXPixelPipeline": _KEPT,
    "SanaPipeline": replace(_KEPT, half="float32"),
    "SanaSprintPipeline": replace(_DISTILLED, layout="bchw", half="float32"),
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": _PIXART,
    "HunyuanDiTPipeline": replace(_KEPT, rescale="_guidance_rescale", variances=True),
    "Lumina2Pipeline": replace(
        _TWO_CALLS, switch="!call.do_classifier_free_truncation", rescale="call.cfg_normalization", kept=("w",)
    ),
    "AuraFlowPipeline": replace(_BATCHED, kept=("w", "cfg")),
    "HiDreamImagePipeline": _BATCHED,
    "ChromaPipeline": _CHROMA,
    "ChromaImg2ImgPipeline": _CHROMA,
    "ZImagePipeline": _ZIMAGE,
    "ZImageImg2ImgPipeline": _ZIMAGE,
    "ZImageInpaintPipeline": _ZIMAGE,
    "CogView3PlusPipeline": replace(_BATCHED, kept=("cfg",), half="float32"),
    "CogView4Pipeline": _TWO_CALLS,
    "HunyuanImagePipeline": PipelineSpec("guider", scales=((),), layout="bchw"),
    "BriaPipeline": replace(_BATCHED, rescale="call.normalize", layout="tokens"),
    "LongCatImagePipeline": replace(_TOKENS, rescale="call.enable_cfg_renorm"),
    "OvisImagePipeline": replace(_TOKENS, kept=("w", "cfg")),
    "PRXPipeline": _KEPT,
    # its CFG is about three of its four channels, and the rest is c's: only what is added to both branches reaches all
    "LuminaPipeline": replace(
        _BATCHED, scales=((),), switch="call.do_classifier_free_guidance", cond_first=True, variances=True
    ),
    "BriaFibo2Pipeline": replace(_TWO_CALLS, half="float32"),
    "QwenImage21Pipeline": _TRUE_CFG,
    "NucleusMoEImagePipeline": replace(
        _TOKENS, scales=(("call.guidance_scale",),), switch="call.do_cfg", rescale="always"
    ),
    "Flux2KleinKVPipeline": _DISTILLED,
    # the other branch is that of a second model, which sees no text
    "Ideogram4Pipeline": PipelineSpec("single", scales=((),), layout="tokens", weight="call.gw", half="float32"),
    "Krea2Pipeline": replace(_TOKENS, offset=1.0, kept=("w",)),
}
