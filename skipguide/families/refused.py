"""Data only: the denoisers of diffusers that are not described, by class name, and why."""

from __future__ import annotations

_UNET = "not yet described: a UNet whose transformer blocks lie between convolutions and long connections"
_CONVOLUTIONS = "a UNet of convolutions: its skip connections are not residual branches that could be left out"
_CACHE = "its blocks fill a cache of keys and values that a skipped pass would overwrite"
_SOUND = "not yet described: a transformer for sound"

UNSUPPORTED_MODELS: dict[str, str] = {
    "AceStepTransformer1DModel": _SOUND,
    "LongCatAudioDiTTransformer": _SOUND,
    "MiniMaxMusic3Transformer1DModel": _SOUND,
    "StableAudio3DiTModel": _SOUND,
    "StableAudioDiTModel": _SOUND,
    "T5FilmDecoder": _SOUND,
    "MiniMaxMusic3RVQDepthDecoder": "autoregressive: it decodes codes one after the other, there is no denoising step",
    "PriorTransformer": "a prior: it predicts an image embedding, and its output is no image or video",
    "RFD4ProteinaTransformer": "a denoiser of molecules: its streams are atoms and pairs of residues, not an image",
    "AnyFlowFARTransformer3DModel": (
        "autoregressive over chunks of frames: its blocks fill a cache of keys and values that a skipped pass would "
        "overwrite"
    ),
    "WanAnimate2Transformer3DModel": _CACHE,
    "QwenImage21Transformer2DModel": _CACHE,
    "Cosmos3OmniTransformer": "the rows of a batch are packed into one sequence, so its blocks have no batch dimension",
    "NucleusMoEImageTransformer2DModel": (
        "not yet described: its mixture of experts picks tokens per expert, so what is left out changes the routing"
    ),
    "ErnieImageTransformer2DModel": (
        "its blocks take [tokens, batch, channels]; blocks are described with the batch as first dimension"
    ),
    "BriaFibo2Transformer2DModel": "not yet described: a packed stream with an optional image attention",
    "Ideogram4Transformer2DModel": "not yet described: a packed stream, guided by a second transformer without text",
    "Flux3Transformer2DModel": "not yet described: a stream per modality, in a dictionary",
    "JoyImageEditTransformer3DModel": "not yet described: dual streams over a sequence of several images",
    "JoyImageEditPlusTransformer3DModel": "not yet described: dual streams over a sequence of several images",
    "Kandinsky6SRTransformer3DModel": "a super-resolution stage: sparse attention in blocks, for flex attention only",
    "LuminaNextDiT2DModel": "not yet described: the predecessor of Lumina2Transformer2DModel",
    "SanaWMTransformer3DModel": "not yet described: a world model, with a camera beside the text",
    "SanaWMLTX2RefinerTransformer3DModel": _CACHE,
    "DreamLiteTransformer2DModel": "a part of DreamLiteUNetModel, not a denoiser of its own",
    "DreamLiteUNetModel": _UNET,
    "Transformer2DModel": "the transformer inside UNets, not a denoiser of its own (DiT and PixArt have own classes)",
    "TransformerTemporalModel": "the temporal transformer inside UNets, not a denoiser of its own",
    "MotionAdapter": "weights of motion modules, to be loaded into a UNetMotionModel",
    "I2VGenXLUNet": _UNET,
    "Kandinsky3UNet": _UNET,
    "UNet3DConditionModel": _UNET,
    "UVit2DModel": "masked token prediction: it fills in discrete codes, there is no noise prediction to guide",
    "StableCascadeUNet": _UNET,
    "UNet1DModel": _CONVOLUTIONS,
    "UNet2DModel": _CONVOLUTIONS,
}
