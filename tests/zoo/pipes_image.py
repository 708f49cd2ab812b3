"""Tiny stock image pipelines, called with random prompt embeddings for latents."""

import functools
import warnings

import diffusers
import torch

from zoo.family import TEXT, randomise, rows
from zoo.image_calls import (
    MASK,
    chroma_call,
    chroma_img2img_call,
    distilled_call,
    flux_control_call,
    flux_control_img2img_call,
    flux_fill_call,
    flux_img2img_call,
    flux_inpaint_call,
    hidream_call,
    hunyuan_dit_call,
    hunyuan_image_call,
    kontext_call,
    krea2_call,
    longcat_call,
    picture,
    qwen_call,
    qwen_img2img_call,
    sana_sprint_call,
    sd3_img2img_call,
    sd3_inpaint_call,
    text_call,
    with_mask,
    zimage_call,
    zimage_img2img_call,
)
from zoo.image_joint import klein
from zoo.pipes import BATCHED, MODELS, SD3_TEXT, SINGLE, TWO_CALLS, PipeCase, flow

ddim = functools.partial(diffusers.DDIMScheduler, clip_sample=False)
dpm = functools.partial(diffusers.DPMSolverMultistepScheduler, solver_order=1)


def flux2_vae():
    """Its batch norm is what Flux 2 normalises latents with."""
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    ).eval()


def image_vae(scale: int = 8, channels: int = 4):
    """A real tiny VAE, for the pipelines that encode an image."""
    blocks = scale.bit_length()
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=channels,
        norm_num_groups=4,
        shift_factor=0.1,
        scaling_factor=0.5,
    ).eval()


def around(cls: str, family: str, scheduler=flow, *absent: str, vae=None, model=None, **config):
    """A pipeline whose components are the denoiser, a scheduler and perhaps a VAE."""

    def make(seed: int) -> diffusers.DiffusionPipeline:
        torch.manual_seed(seed)
        nothing = dict.fromkeys((*absent, "text_encoder", "tokenizer"))
        denoiser = MODELS[family].build(seed) if model is None else randomise(model(), seed + 1)
        made = None if vae is None else vae()
        return getattr(diffusers, cls)(**nothing, vae=made, transformer=denoiser, scheduler=scheduler(), **config)

    return make


def hidream(seed: int):
    pipe = around("HiDreamImagePipeline", "hidream", flow, *HIDREAM_TEXT)(seed)
    pipe.default_sample_size = 8  # it scales what is asked for to the area of its training
    return pipe


def wider(family: str, channels: int, out_channels: int):
    """The same transformer with more input channels."""

    def make():
        model = MODELS[family].make()
        return type(model)(**{**model.config, "in_channels": channels, "out_channels": out_channels})

    return make


def qwen_vae():
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    ).eval()


def deep_vae():
    """Sana's: eight pixels of a picture are one of its latents."""
    return diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 4,
        decoder_block_types=("ResBlock",) * 4,
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4,
        encoder_layers_per_block=(1,) * 4,
        decoder_layers_per_block=(1,) * 4,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.5,
    ).eval()


def hunyuan_image(seed: int, guidance_scale: float = 3.5):
    """The guider is a component, so CFG is not an argument of the call."""
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=guidance_scale)
    absent = ("text_encoder_2", "tokenizer_2", "ocr_guider")
    return around("HunyuanImagePipeline", "hunyuan_image", flow, *absent, guider=guider)(seed)


def longcat(seed: int):
    """It wants words, whose embeddings are made here."""
    config = dict(MODELS["longcat"].make().config) | {"in_channels": 64}  # it makes 16 channels of latents, always
    model = functools.partial(diffusers.LongCatImageTransformer2DModel, **config)
    pipe = around("LongCatImagePipeline", "longcat", flow, "text_processor", model=model)(seed)

    def encode(prompt, num_images_per_prompt=1, prompt_embeds=None):
        words = [prompt] if isinstance(prompt, str) else prompt
        text = torch.cat([rows(1, sum(map(ord, word)) + 1, TEXT, 24) for word in words])
        return text, torch.zeros(TEXT, 3)

    pipe.encode_prompt = encode
    return pipe


def prx(seed: int):
    with warnings.catch_warnings():  # diffusers' own use of a class that it deprecates
        warnings.simplefilter("ignore", FutureWarning)
        return around("PRXPipeline", "prx")(seed)


def prx_pixel(seed: int):
    """It makes pixels, no latents."""
    with warnings.catch_warnings():  # diffusers' own use of a class that it deprecates
        warnings.simplefilter("ignore", FutureWarning)
        config = dict(MODELS["prx"].make().config) | {"in_channels": 3}
        model = randomise(diffusers.PRXTransformer2DModel(**config), seed + 1)
        return diffusers.PRXPixelPipeline(model, flow(), text_encoder=None, tokenizer=None)


def dit(seed: int):
    """It knows a thousand classes, and none; what it gives is decoded, always."""
    config = dict(MODELS["dit"].make().config) | {"num_embeds_ada_norm": 1000}
    model = functools.partial(diffusers.DiTTransformer2DModel, **config)
    torch.manual_seed(seed)
    return diffusers.DiTPipeline(transformer=randomise(model(), seed + 1), vae=image_vae(), scheduler=ddim())


def dit_call(num_prompts: int, cfg: bool):
    return {"class_labels": [3, 5][:num_prompts], "guidance_scale": 4.0 if cfg else 1.0, "output_type": "pt"}


BINNING = {"use_resolution_binning": False}
HIDREAM_TEXT = ("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3", "text_encoder_4", "tokenizer_4")
FLUX_TEXT = ("text_encoder_2", "tokenizer_2")
shifted = functools.partial(flow, shift=3.0)
dynamic = functools.partial(flow, use_dynamic_shifting=True)

IMAGE_PIPES = (
    PipeCase(
        "sd3_img2img",
        "sd3",
        around("StableDiffusion3Img2ImgPipeline", "sd3", shifted, *SD3_TEXT, vae=image_vae),
        sd3_img2img_call,
        BATCHED,
    ),
    PipeCase(
        "sd3_inpaint",
        "sd3",
        around(
            "StableDiffusion3InpaintPipeline",
            "sd3",
            shifted,
            *SD3_TEXT,
            vae=functools.partial(image_vae, channels=16),
            model=wider("sd3", 16, 16),
        ),
        sd3_inpaint_call,
        BATCHED,
    ),
    PipeCase(
        "flux_img2img",
        "flux",
        around("FluxImg2ImgPipeline", "flux", flow, *FLUX_TEXT, vae=image_vae),
        flux_img2img_call,
        TWO_CALLS,
    ),
    PipeCase(
        "flux_inpaint",
        "flux",
        around("FluxInpaintPipeline", "flux", flow, *FLUX_TEXT, vae=image_vae),
        flux_inpaint_call,
        TWO_CALLS,
    ),
    PipeCase(
        "flux_kontext",
        "flux",
        around("FluxKontextPipeline", "flux", flow, *FLUX_TEXT, vae=image_vae),
        kontext_call,
        TWO_CALLS,
    ),
    PipeCase(
        "flux_control",
        "flux",
        around("FluxControlPipeline", "flux", flow, *FLUX_TEXT, vae=image_vae, model=wider("flux", 32, 16)),
        flux_control_call,
        SINGLE,
    ),
    PipeCase(
        "flux_fill",
        "flux",
        around("FluxFillPipeline", "flux", flow, *FLUX_TEXT, vae=image_vae, model=wider("flux", 288, 16)),
        flux_fill_call,
        SINGLE,
    ),
    PipeCase("flux2", "flux2", around("Flux2Pipeline", "flux2"), distilled_call, SINGLE),
    PipeCase(
        "flux2_klein",
        "flux2",
        around("Flux2KleinPipeline", "flux2", model=klein, vae=flux2_vae),
        text_call(16, 4.0),
        TWO_CALLS,
    ),
    PipeCase("qwen_image", "qwen_image", around("QwenImagePipeline", "qwen_image"), qwen_call, TWO_CALLS),
    PipeCase(
        "qwen_img2img",
        "qwen_image",
        around("QwenImageImg2ImgPipeline", "qwen_image", vae=qwen_vae),
        qwen_img2img_call,
        TWO_CALLS,
    ),
    PipeCase(
        "sana",
        "sana",
        around("SanaPipeline", "sana", shifted),
        text_call(256, 4.5, mask=MASK, negative_prompt=None, **BINNING),
        BATCHED,
    ),
    PipeCase(
        "sana_sprint",
        "sana_sprint",
        around("SanaSprintPipeline", "sana_sprint", diffusers.SCMScheduler),
        sana_sprint_call,
        SINGLE,
    ),
    PipeCase(
        "pixart_alpha",
        "pixart",
        around("PixArtAlphaPipeline", "pixart", ddim),
        text_call(64, 4.5, mask=MASK, negative_prompt=None, clean_caption=False, **BINNING),
        BATCHED,
    ),
    PipeCase(
        "pixart_sigma",
        "pixart",
        around("PixArtSigmaPipeline", "pixart", ddim),
        text_call(64, 4.5, mask=MASK, negative_prompt=None, clean_caption=False, **BINNING),
        BATCHED,
    ),
    PipeCase(
        "hunyuan_dit",
        "hunyuan_dit",
        around(
            "HunyuanDiTPipeline",
            "hunyuan_dit",
            ddim,
            *FLUX_TEXT,
            "safety_checker",
            "feature_extractor",
            requires_safety_checker=False,
        ),
        hunyuan_dit_call,
        BATCHED,
    ),
    PipeCase("lumina2", "lumina2", around("Lumina2Pipeline", "lumina2"), text_call(64, 4.0, mask=MASK), TWO_CALLS),
    PipeCase("auraflow", "auraflow", around("AuraFlowPipeline", "auraflow"), text_call(64, 3.5, mask=MASK), BATCHED),
    PipeCase("hidream", "hidream", hidream, hidream_call, BATCHED),
    PipeCase("chroma", "chroma", around("ChromaPipeline", "chroma"), chroma_call, TWO_CALLS),
    PipeCase(
        "chroma_img2img",
        "chroma",
        around("ChromaImg2ImgPipeline", "chroma", vae=image_vae),
        chroma_img2img_call,
        TWO_CALLS,
    ),
    PipeCase("zimage", "zimage", around("ZImagePipeline", "zimage"), zimage_call, BATCHED),
    PipeCase(
        "zimage_img2img",
        "zimage",
        around("ZImageImg2ImgPipeline", "zimage", vae=image_vae),
        zimage_img2img_call,
        BATCHED,
    ),
    PipeCase("cogview3", "cogview3", around("CogView3PlusPipeline", "cogview3", ddim), text_call(64, 5.0), BATCHED),
    PipeCase("cogview4", "cogview4", around("CogView4Pipeline", "cogview4"), text_call(64, 5.0), TWO_CALLS),
    PipeCase("hunyuan_image", "hunyuan_image", hunyuan_image, hunyuan_image_call, ("two_calls",)),
    PipeCase(
        "bria",
        "bria",
        around("BriaPipeline", "bria", dynamic, "image_encoder", "feature_extractor", vae=image_vae),
        text_call(64, 5.0),
        BATCHED,
    ),
    PipeCase(
        "longcat",
        "longcat",
        longcat,
        longcat_call,
        TWO_CALLS,
    ),
    PipeCase("ovis", "ovis", around("OvisImagePipeline", "ovis"), text_call(64, 5.0, negative_prompt=None), TWO_CALLS),
    PipeCase("prx", "prx", prx, text_call(64, 4.0, mask=MASK, **BINNING), BATCHED),
    PipeCase("dit", "dit", dit, dit_call, BATCHED),
    PipeCase(
        "prx_pixel",
        "prx",
        prx_pixel,
        text_call(16, 4.0, mask=MASK, **BINNING),
        BATCHED,
    ),
    PipeCase("krea2", "krea2", around("Krea2Pipeline", "krea2"), krea2_call, TWO_CALLS),
    PipeCase(
        "flux_kontext_inpaint",
        "flux",
        around("FluxKontextInpaintPipeline", "flux", flow, *FLUX_TEXT, vae=image_vae),
        with_mask(flux_img2img_call, max_area=64 * 64, _auto_resize=False),
        TWO_CALLS,
    ),
    PipeCase(
        "flux_control_img2img",
        "flux",
        around("FluxControlImg2ImgPipeline", "flux", flow, *FLUX_TEXT, vae=image_vae, model=wider("flux", 32, 16)),
        flux_control_img2img_call,
        SINGLE,
    ),
    PipeCase(
        "flux_control_inpaint",
        "flux",
        around("FluxControlInpaintPipeline", "flux", flow, *FLUX_TEXT, vae=image_vae, model=wider("flux", 32, 16)),
        with_mask(flux_control_img2img_call),
        SINGLE,
    ),
    PipeCase(
        "zimage_inpaint",
        "zimage",
        around("ZImageInpaintPipeline", "zimage", vae=image_vae),
        with_mask(zimage_img2img_call),
        BATCHED,
    ),
    PipeCase(
        "qwen_inpaint",
        "qwen_image",
        around("QwenImageInpaintPipeline", "qwen_image", vae=qwen_vae),
        with_mask(qwen_img2img_call),
        TWO_CALLS,
    ),
    PipeCase(
        "flux2_klein_inpaint",
        "flux2",
        around("Flux2KleinInpaintPipeline", "flux2", model=klein, vae=flux2_vae),
        with_mask(text_call(16, 4.0), image=picture(16), strength=1.0),
        TWO_CALLS,
    ),
)
