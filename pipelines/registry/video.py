"""Data only: how each video pipeline of diffusers drives its denoiser."""

from __future__ import annotations

from dataclasses import replace

from skipguide.pipelines.registry.spec import PipelineSpec

_WAN = PipelineSpec(
    "two_calls",
    denoisers=("transformer", "transformer_2"),
    scales=(("_guidance_scale",), ("_guidance_scale_2", "_guidance_scale")),
    kept=("w",),
    half="float32",
)
_LTX = PipelineSpec("batched", rescale="_guidance_rescale", layout="tokens", half="float32")
_COG = PipelineSpec("batched", dynamic=True, kept=("cfg",), layout="bfchw", half="float32")
_UNET = ("unet",)
_ANIMATEDIFF = PipelineSpec("batched", denoisers=_UNET, kept=("w",), half="once")
_TRUE_CFG = PipelineSpec("two_calls", scales=(("call.true_cfg_scale",),), switch="call.do_true_cfg")
_GUIDER = PipelineSpec("guider", scales=((),))
_TRUE_CFG_FLOAT = replace(_TRUE_CFG, half="float32")
_ANYFLOW = PipelineSpec("batched", kept=("w",), half="once")
_SANA_VIDEO = PipelineSpec("batched", kept=("w",), half="float32")
_EASYANIMATE = PipelineSpec("batched", kept=("w",), rescale="_guidance_rescale", half="once")
_TWO_CALLS = PipelineSpec("two_calls", kept=("w",), half="float32")
# c + g (c - u)
_COSMOS = PipelineSpec("two_calls", offset=1.0, switch="do_classifier_free_guidance", half="float32")
_KANDINSKY5 = PipelineSpec("two_calls", kept=("w",), layout="bfhwc", half="float32")
_SKYREELS_DF = replace(_TWO_CALLS, chunked=True)
# video and sound, each with a scale of its own; further passes for its own skip and modality guidance
_LTX2 = PipelineSpec(
    "batched",
    rescale="_guidance_rescale _audio_guidance_rescale",
    layout="tokens",
    passive=("spatio_temporal_guidance_blocks", "isolate_modalities"),
    native="spatio_temporal_guidance_blocks",
    native_off=(("stg_scale", 0.0), ("audio_stg_scale", 0.0)),
    native_needs="perturbed_attn",
    joined=("_guidance_scale", "_audio_guidance_scale"),
    modalities=("video", "audio"),
    noisy=("call.latents", "call.audio_latents"),
    half="float32",
)
# its sound is thrown away: the video alone is guided, and of the pair that the denoiser predicts only that is touched
_LTX2_HDR = replace(
    _LTX2,
    rescale="_guidance_rescale",
    native_off=(("stg_scale", 0.0),),
    joined=(),
    modalities=(),
    noisy=("call.latents",),
)
# distilled: one pass a step without CFG, which video and sound have in common
_LTX2_DFR = PipelineSpec("single", layout="tokens", modalities=("video", "audio"), half="float32")

VIDEO_PIPELINES: dict[str, PipelineSpec] = {
    "LTXPipeline": _LTX,
    "LTXImageToVideoPipeline": _LTX,
    "WanPipeline": _WAN,
    "WanImageToVideoPipeline": _WAN,
    "CogVideoXPipeline": _COG,
    "CogVideoXImageToVideoPipeline": _COG,
    "MochiPipeline": PipelineSpec("batched", half="float32"),
    "HunyuanVideoPipeline": _TRUE_CFG,
    "HunyuanVideo15Pipeline": _GUIDER,
    "HunyuanVideo15ImageToVideoPipeline": _GUIDER,
    "MotifVideoPipeline": _GUIDER,
    "MotifVideoImage2VideoPipeline": _GUIDER,
    "HunyuanVideoImageToVideoPipeline": _TRUE_CFG_FLOAT,
    "HunyuanSkyreelsImageToVideoPipeline": _TRUE_CFG,
    "HunyuanVideoFramepackPipeline": _TRUE_CFG_FLOAT,
    "LTXConditionPipeline": _LTX,
    "LTX2Pipeline": _LTX2,
    "LTX2ImageToVideoPipeline": _LTX2,
    "LTX2ConditionPipeline": _LTX2,
    "LTX2InContextPipeline": _LTX2,
    "LTX2HDRPipeline": _LTX2_HDR,
    "LTX2DFRPipeline": _LTX2_DFR,
    "WanVACEPipeline": _WAN,
    "LucyEditPipeline": _WAN,
    "WanVideoToVideoPipeline": _TWO_CALLS,
    "WanAnimatePipeline": _TWO_CALLS,
    "SkyReelsV2Pipeline": _TWO_CALLS,
    "SkyReelsV2ImageToVideoPipeline": _TWO_CALLS,
    "SkyReelsV2DiffusionForcingPipeline": _SKYREELS_DF,
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": _SKYREELS_DF,
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": _SKYREELS_DF,
    "ChronoEditPipeline": _TWO_CALLS,
    "HeliosPipeline": _TWO_CALLS,
    "AnyFlowPipeline": _ANYFLOW,
    "CogVideoXVideoToVideoPipeline": _COG,
    "CogVideoXFunControlPipeline": _COG,
    "ConsisIDPipeline": _COG,
    "EasyAnimatePipeline": _EASYANIMATE,
    "EasyAnimateInpaintPipeline": _EASYANIMATE,
    "AllegroPipeline": PipelineSpec("batched", kept=("w", "cfg"), half="once"),
    "SanaVideoPipeline": _SANA_VIDEO,
    "SanaImageToVideoPipeline": _SANA_VIDEO,
    "CosmosTextToWorldPipeline": _COSMOS,
    "CosmosVideoToWorldPipeline": _COSMOS,
    "Cosmos2TextToImagePipeline": _COSMOS,
    "Cosmos2VideoToWorldPipeline": _COSMOS,
    "Cosmos2_5_PredictBasePipeline": _COSMOS,
    "Kandinsky5T2VPipeline": _KANDINSKY5,
    "Kandinsky5I2VPipeline": _KANDINSKY5,
    "Kandinsky5T2IPipeline": replace(_KANDINSKY5, half="rounded"),
    "Kandinsky5I2IPipeline": _KANDINSKY5,
    "Kandinsky6TI2VAPipeline": PipelineSpec(
        "two_calls",
        layout="bfhwc",
        joined=("_guidance_scale", "_guidance_scale"),
        modalities=("video", "audio"),
    ),
    "LattePipeline": PipelineSpec("batched", kept=("w", "cfg"), half="once"),
    # a scale per frame
    "StableVideoDiffusionPipeline": PipelineSpec("batched", denoisers=_UNET, layout="bfchw", half="once"),
    "AnimateDiffPipeline": _ANIMATEDIFF,
    "AnimateDiffVideoToVideoPipeline": _ANIMATEDIFF,
    "AnimateDiffSDXLPipeline": PipelineSpec("batched", denoisers=_UNET, rescale="_guidance_rescale", half="once"),
}
