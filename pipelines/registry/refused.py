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
        "a fork for perturbed-attention guidance, whose batch has a perturbed third part of its own: guide the "
        "pipeline it was forked from; PrefixReuse makes the fork's own guidance cheaper",
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
        "a side network (ControlNet, T2I-Adapter) runs before the denoiser, and what it gives is added between the "
        "blocks: not yet proven with skipped passes",
        """
        ZImageControlNetInpaintPipeline ZImageControlNetPipeline
        """,
    ),
    (
        "a prior: it predicts an image embedding, no image",
        """
        FluxPriorReduxPipeline KandinskyPriorPipeline KandinskyV22PriorEmb2EmbPipeline KandinskyV22PriorPipeline
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
        AnyFlowFARPipeline Cosmos3OmniPipeline ErnieImagePipeline JoyImageEditPipeline JoyImageEditPlusPipeline
        Kandinsky6SRPipeline
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
        "not yet described: its CFG has three branches where there are input images",
        """
        OmniGenPipeline
        """,
    ),
    (
        "not yet described: it goes through a table of steps for every piece of the video, distilled, with one pass "
        "a step",
        """
        LTX2DFRTemporalRefinePipeline
        """,
    ),
    (
        "what its ControlNet adds between the blocks is padded to the longer prompt of the batch, and a skipped "
        "pass for the other one is shorter",
        """
        ZImageControlNetInpaintPipeline ZImageControlNetPipeline
        """,
    ),
    (
        "runs a pipeline and another for a larger picture: guide its generation_pipe, which it calls",
        """
        VisualClozePipeline
        """,
    ),
    (
        "cannot run in diffusers 0.42.1: it gives its encode_prompt a text_encoder_index, which that does not take",
        """
        EasyAnimateControlPipeline
        """,
    ),
    (
        "goes through its steps once for each stage of a pyramid, with timesteps of that stage's own: not yet proven",
        """
        HeliosPyramidPipeline
        """,
    ),
    (
        "goes through a table of steps for every window of the video, and may leave steps of it out: not yet proven",
        """
        LTXI2VLongMultiPromptPipeline
        """,
    ),
    (
        "goes through its steps once for each chunk of the video, with a ControlNet between them: not yet proven",
        """
        Cosmos2_5_TransferPipeline
        """,
    ),
    (
        "its batch is a list of lists of pictures, of which rows cannot be taken yet",
        """
        ZImageOmniPipeline
        """,
    ),
    (
        "calls its transformer for the input pictures before the first step, to fill a cache of keys and values; "
        "which of these calls is a step is not said",
        """
        GlmImagePipeline
        """,
    ),
)

UNSUPPORTED_PIPELINES: dict[str, str] = {name: reason for reason, names in _BY_REASON for name in names.split()}
