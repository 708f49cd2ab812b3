"""Data only: the pipelines of diffusers that are not described, and why."""

from __future__ import annotations

_BY_REASON: tuple[tuple[str, str], ...] = (
    (
        "the base class of all pipelines",
        """
        DiffusionPipeline
        """,
    ),
    (
        "deprecated by diffusers, which keeps it without maintaining it",
        """
        AltDiffusionImg2ImgPipeline AltDiffusionPipeline AmusedImg2ImgPipeline AmusedInpaintPipeline
        AmusedPipeline AudioLDMPipeline BlipDiffusionControlNetPipeline BlipDiffusionPipeline
        CycleDiffusionPipeline DanceDiffusionPipeline I2VGenXLPipeline KarrasVePipeline LDMPipeline
        MusicLDMPipeline PIAPipeline PNDMPipeline PaintByExamplePipeline RePaintPipeline ScoreSdeVePipeline
        SemanticStableDiffusionPipeline StableCascadeCombinedPipeline StableCascadeDecoderPipeline
        StableCascadePriorPipeline StableDiffusionAttendAndExcitePipeline StableDiffusionControlNetXSPipeline
        StableDiffusionDiffEditPipeline StableDiffusionGLIGENPipeline StableDiffusionGLIGENTextImagePipeline
        StableDiffusionInpaintPipelineLegacy StableDiffusionLDM3DPipeline StableDiffusionModelEditingPipeline
        StableDiffusionPanoramaPipeline StableDiffusionParadigmsPipeline StableDiffusionPipelineSafe
        StableDiffusionPix2PixZeroPipeline StableDiffusionSAGPipeline StableDiffusionXLControlNetXSPipeline
        TextToVideoSDPipeline TextToVideoZeroPipeline TextToVideoZeroSDXLPipeline UnCLIPImageVariationPipeline
        UnCLIPPipeline UniDiffuserPipeline VQDiffusionPipeline VersatileDiffusionDualGuidedPipeline
        VersatileDiffusionImageVariationPipeline VersatileDiffusionPipeline
        VersatileDiffusionTextToImagePipeline VideoToVideoSDPipeline WuerstchenCombinedPipeline
        WuerstchenDecoderPipeline WuerstchenPriorPipeline
        """,
    ),
    (
        "a fork for perturbed-attention guidance, whose batch has a perturbed third part of its own: guide "
        "the pipeline it was forked from; PrefixReuse makes the fork's own guidance cheaper",
        """
        AnimateDiffPAGPipeline HunyuanDiTPAGPipeline KolorsPAGPipeline PixArtSigmaPAGPipeline SanaPAGPipeline
        StableDiffusion3PAGImg2ImgPipeline StableDiffusion3PAGPipeline
        StableDiffusionControlNetPAGInpaintPipeline StableDiffusionControlNetPAGPipeline
        StableDiffusionPAGImg2ImgPipeline StableDiffusionPAGInpaintPipeline StableDiffusionPAGPipeline
        StableDiffusionXLControlNetPAGImg2ImgPipeline StableDiffusionXLControlNetPAGPipeline
        StableDiffusionXLPAGImg2ImgPipeline StableDiffusionXLPAGInpaintPipeline StableDiffusionXLPAGPipeline
        """,
    ),
    (
        "a side network (ControlNet, T2I-Adapter) runs before the denoiser, and what it gives is added "
        "between the blocks: not yet proven with skipped passes",
        """
        HunyuanDiTControlNetPipeline QwenImageControlNetInpaintPipeline QwenImageControlNetPipeline
        SanaControlNetPipeline ZImageControlNetInpaintPipeline ZImageControlNetPipeline
        """,
    ),
    (
        "a prior: it predicts an image embedding, no image",
        """
        FluxPriorReduxPipeline KandinskyPriorPipeline KandinskyV22PriorEmb2EmbPipeline KandinskyV22PriorPipeline
        """,
    ),
    (
        "runs a prior and a decoder one after the other: guide its decoder, pipe.decoder_pipe, which is described",
        """
        KandinskyCombinedPipeline KandinskyImg2ImgCombinedPipeline KandinskyInpaintCombinedPipeline
        KandinskyV22CombinedPipeline KandinskyV22Img2ImgCombinedPipeline KandinskyV22InpaintCombinedPipeline
        """,
    ),
    (
        "a latent upsampler or decoder without a guided denoiser",
        """
        LTX2LatentUpsamplePipeline LTX2VideoDiffusionDecodePipeline LTXLatentUpsamplePipeline
        StableDiffusionLatentUpscalePipeline
        """,
    ),
    (
        "predicts depth, normals or materials of an image; it is not guided",
        """
        MarigoldDepthPipeline MarigoldIntrinsicsPipeline MarigoldNormalsPipeline
        """,
    ),
    (
        "a language model: it predicts tokens, there is no denoiser of images",
        """
        DiffusionGemmaPipeline LLaDA2Pipeline
        """,
    ),
    (
        "its denoiser makes sound (see what is said of the model)",
        """
        AceStepPipeline AudioLDM2Pipeline LongCatAudioDiTPipeline StableAudio3AudioToAudioPipeline
        StableAudio3InpaintPipeline StableAudio3Pipeline StableAudioPipeline
        """,
    ),
    (
        "makes molecules",
        """
        RFD4ProteinaPipeline
        """,
    ),
    (
        "makes three-dimensional shapes with a prior",
        """
        ShapEImg2ImgPipeline ShapEPipeline
        """,
    ),
    (
        "its denoiser is a UNet that is not described",
        """
        DreamLiteMobilePipeline DreamLitePipeline Kandinsky3Img2ImgPipeline Kandinsky3Pipeline
        LDMTextToImagePipeline
        """,
    ),
    (
        "its CFG has three branches, one of them with the picture alone",
        """
        StableDiffusionInstructPix2PixPipeline StableDiffusionXLInstructPix2PixPipeline
        """,
    ),
    (
        "an editing method with a guidance of its own for every concept, and as many branches",
        """
        LEditsPPPipelineStableDiffusion LEditsPPPipelineStableDiffusionXL
        """,
    ),
    (
        "its denoiser is a UNet of convolutions, and there is no guidance",
        """
        ConsistencyModelPipeline DDIMPipeline DDPMPipeline LDMSuperResolutionPipeline
        """,
    ),
    (
        "its transformer is not described; its own entry says why",
        """
        AnyFlowFARPipeline BriaFibo2Pipeline Cosmos3OmniPipeline ErnieImagePipeline Ideogram4Pipeline
        JoyImageEditPipeline JoyImageEditPlusPipeline Kandinsky6SRPipeline LuminaPipeline
        NucleusMoEImagePipeline QwenImage21Pipeline
        """,
    ),
    (
        "not yet described: a refinement stage or a world model, with denoising of its own kind",
        """
        HunyuanImageRefinerPipeline SanaWMLTX2Refiner SanaWMPipeline
        """,
    ),
    (
        "cannot run in diffusers 0.42.1: it reads guidance_embeds, which Chroma's config does not have",
        """
        ChromaInpaintPipeline
        """,
    ),
    (
        "its first calls fill a cache of keys and values that a skipped pass would overwrite",
        """
        Flux2KleinKVPipeline GlmImagePipeline
        """,
    ),
    (
        "not yet described: its CFG has three branches where there are input images",
        """
        OmniGenPipeline
        """,
    ),
    (
        "not yet described: it goes through a table of steps for every piece of the video, distilled, with one pass a "
        "step",
        """
        LTX2DFRTemporalRefinePipeline
        """,
    ),
    (
        "not yet described: its transformer is, but how the pipeline calls it is not proven",
        """
        BriaFiboEditPipeline BriaFiboPipeline CogView4ControlPipeline Cosmos2_5_TransferPipeline DiTPipeline
        EasyAnimateControlPipeline HeliosPyramidPipeline LTXI2VLongMultiPromptPipeline LongCatImageEditPipeline
        PRXPixelPipeline QwenImageEditInpaintPipeline
        QwenImageLayeredPipeline SanaSprintImg2ImgPipeline VisualClozeGenerationPipeline VisualClozePipeline
        ZImageOmniPipeline
        """,
    ),
)

UNSUPPORTED_PIPELINES: dict[str, str] = {name: reason for reason, names in _BY_REASON for name in names.split()}
