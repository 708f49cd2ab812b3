"""Tiny stock pipelines around the UNet of Stable Diffusion, called with random embeddings for latents."""

import functools
import importlib
import sys
import warnings
from unittest import mock

import diffusers
import torch

from zoo.family import TEXT, randomise, rows
from zoo.image_calls import picture
from zoo.pipes import BATCHED, SINGLE, PipeCase, embeds, placed, size
from zoo.pipes_image import image_vae
from zoo.unet_picture import TEXT_WIDTH, sd, sdxl

# as the released checkpoints have it
ddim = functools.partial(
    diffusers.DDIMScheduler, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
)
lcm = functools.partial(diffusers.LCMScheduler, beta_schedule="scaled_linear", clip_sample=False)
SAFETY = ("safety_checker", "feature_extractor")
CHECKER = {"requires_safety_checker": False} | dict.fromkeys(SAFETY)
XL = ("text_encoder_2", "tokenizer_2")
W = 7.5
PIXELS = 64


def around(cls, unet, *absent: str, scheduler=ddim, vae=image_vae, text=True, **config):
    """A pipeline whose components are a UNet, a scheduler and perhaps a VAE."""

    def make(seed: int) -> diffusers.DiffusionPipeline:
        torch.manual_seed(seed)
        nothing = dict.fromkeys((*absent, "text_encoder", "tokenizer") if text else absent)
        made = {} if vae is None else {"vae": vae()}
        parts = {name: value() if callable(value) else value for name, value in config.items()}
        made_by = getattr(diffusers, cls) if isinstance(cls, str) else cls
        return made_by(**nothing, **made, **parts, unet=randomise(unet(), seed + 1), scheduler=scheduler())

    return make


def text_call(pooled: bool = False, w: float = W, **more):
    """Embeddings, a size and a scale."""

    def call(num_prompts: int, cfg: bool):
        return {
            **embeds(num_prompts, cfg, pooled=pooled),
            **size(PIXELS),
            "guidance_scale": w if cfg else 1.0,
            **{name: value(num_prompts) if callable(value) else value for name, value in more.items()},
        }

    return call


def without(call, *names: str):
    def made(num_prompts: int, cfg: bool):
        return {name: value for name, value in call(num_prompts, cfg).items() if name not in names}

    return made


def pictures(number: int):
    return [picture(PIXELS)] * number


def masks(number: int):
    return [picture(PIXELS).convert("L")] * number


SOME = {"image": pictures, "strength": 0.6, "num_inference_steps": 5}  # three steps
SIZE = ("height", "width")


def sd_case(name, cls, call, unet=sd, *absent, modes=BATCHED, **config):
    return PipeCase(name, "sd", around(cls, unet, *absent, **CHECKER, **config), call, modes)


def sdxl_case(name, cls, call, unet=sdxl, *absent, **config):
    absent = ("text_encoder_2", "tokenizer_2", *absent)
    return PipeCase(
        name, "sdxl", around(cls, unet, *absent, add_watermarker=False, vae=xl_vae, **config), call, BATCHED
    )


def kolors_case(name, cls, call):
    """Its tokenizer, which is not used, wants a library that may not be there."""

    def make(seed: int):
        with mock.patch.dict(sys.modules, {"sentencepiece": mock.MagicMock()}), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its text encoder's way of compiling
            home = importlib.import_module(f"diffusers.pipelines.kolors.pipeline_{name}")
        pipe = around(getattr(home, cls), sdxl, vae=xl_vae)(seed)
        if name == "kolors_img2img":  # it loses the pooled embeddings that it is given
            names = [f"{sign}{pooled}prompt_embeds" for pooled in ("", "pooled_") for sign in ("", "negative_")]

            def encode(prompt, prompt_embeds, **_):
                known = placed(embeds(len(prompt_embeds), True, pooled=True), pipe)
                return tuple(known[name] for name in names)

            pipe.encode_prompt = encode
        return pipe

    return PipeCase(name, "sdxl", make, call, BATCHED)


def xl_vae():
    vae = image_vae()
    vae.register_to_config(force_upcast=False)
    return vae


def image_variation(seed: int):
    """The picture's embedding stands where the text's is, and there is one token."""
    absent = dict.fromkeys(SAFETY)
    pipe = diffusers.StableDiffusionImageVariationPipeline(
        vae=image_vae(),
        image_encoder=None,
        unet=randomise(sd(), seed + 1),
        scheduler=ddim(),
        requires_safety_checker=False,
        **absent,
    )

    def encode(image, device, num_images_per_prompt, do_classifier_free_guidance):
        found = rows(image.shape[0], 1, 1, TEXT_WIDTH).to(pipe.unet.dtype)
        return torch.cat([torch.zeros_like(found), found]) if do_classifier_free_guidance else found

    pipe._encode_image = encode
    return pipe


def image_variation_call(num_prompts: int, cfg: bool):
    return {"image": rows(num_prompts, 7, 3, PIXELS, PIXELS), **size(PIXELS), "guidance_scale": W if cfg else 1.0}


def upscaled():
    """Attention to the text alone on the way down and in the middle; the level of noise is a class."""
    return sd(in_channels=7, num_class_embeds=400, only_cross_attention=(True, False))


def upscaling_vae():
    vae = image_vae(4)
    vae.register_to_config(scaling_factor=0.08333)
    return vae


def upscale_call(num_prompts: int, cfg: bool):
    """Its own noise is drawn for every picture of the batch."""
    image = rows(num_prompts, 7, 3, 8, 8).sigmoid()
    call = without(text_call(), *SIZE)(num_prompts, cfg)
    return {**call, "image": image, "noise_level": 20}


def unclip_unet():
    return sd(class_embed_type="projection", projection_class_embeddings_input_dim=40)


def unclip(cls: str, *absent: str):
    """The prior gives an embedding; what it is made of is not what guidance is about."""

    def make(seed: int):
        from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

        config = {
            "image_normalizer": lambda: StableUnCLIPImageNormalizer(embedding_dim=20),
            "image_noising_scheduler": lambda: diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        }
        if cls == "StableUnCLIPImg2ImgPipeline":
            config["image_encoder"] = lambda: StableUnCLIPImageNormalizer(1)  # it is asked for its dtype alone
        else:
            config["prior"] = lambda: randomise(
                diffusers.PriorTransformer(
                    num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=20, num_embeddings=TEXT
                ),
                seed + 7,
            )
            config["prior_scheduler"] = lambda: diffusers.UnCLIPScheduler(
                variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000
            )
        pipe = around(cls, unclip_unet, *absent, **config)(seed)
        if cls == "StableUnCLIPPipeline":

            def encode(prompt, device, num_images_per_prompt, do_classifier_free_guidance):
                batch = (len(prompt) if isinstance(prompt, list) else 1) * (1 + do_classifier_free_guidance)
                dtype = pipe.prior.dtype
                text = rows(batch, 8, 20).to(dtype), rows(batch, 9, TEXT, 20).to(dtype)
                return *text, torch.ones(batch, TEXT, dtype=torch.bool)

            pipe._encode_prior_prompt = encode
            plain = pipe.encode_prompt
            pipe.encode_prompt = lambda prompt, **how: plain(None, **how | _texts(prompt, pipe))
        return pipe

    return make


def _texts(prompt, pipe):
    number = len(prompt) if isinstance(prompt, list) else 1
    return {name: value.to(pipe.unet.dtype) for name, value in embeds(number, True).items()}


def unclip_call(num_prompts: int, cfg: bool):
    return {
        "prompt": ["a tram"] * num_prompts,
        "prior_num_inference_steps": 2,
        "noise_level": 0,
        **size(PIXELS),
        "guidance_scale": W if cfg else 1.0,
    }


def unclip_image_call(num_prompts: int, cfg: bool):
    return {**text_call()(num_prompts, cfg), "image_embeds": rows(num_prompts, 9, 20)}


def lcm_unet():
    """The scale is embedded in the denoiser: there is no second branch."""
    return sd(time_cond_proj_dim=16)


def lcm_call(num_prompts: int, cfg: bool, **more):
    return {**embeds(num_prompts, False), "guidance_scale": 8.5, "original_inference_steps": 10, **more}


INPAINT = {**SOME, "mask_image": masks}

PICTURE_PIPES = (
    sd_case("sd", "StableDiffusionPipeline", text_call()),
    sd_case("sd_img2img", "StableDiffusionImg2ImgPipeline", without(text_call(**SOME), *SIZE)),
    sd_case("sd_inpaint", "StableDiffusionInpaintPipeline", text_call(**INPAINT)),
    sd_case("sd_inpaint_masked", "StableDiffusionInpaintPipeline", text_call(**INPAINT), lambda: sd(in_channels=9)),
    PipeCase(
        "sd_depth",
        "sd",
        around("StableDiffusionDepth2ImgPipeline", lambda: sd(in_channels=5), "depth_estimator", "feature_extractor"),
        without(text_call(**SOME, depth_map=lambda number: rows(number, 6, 8, 8)), *SIZE),
        BATCHED,
    ),
    PipeCase("sd_variation", "sd", image_variation, image_variation_call, BATCHED),
    PipeCase(
        "sd_upscale",
        "sd",
        around(
            "StableDiffusionUpscalePipeline",
            upscaled,
            "watermarker",
            *SAFETY,
            vae=upscaling_vae,
            low_res_scheduler=diffusers.DDPMScheduler,
        ),
        upscale_call,
        BATCHED,
    ),
    PipeCase(
        "sd_unclip",
        "sd",
        unclip("StableUnCLIPPipeline", "prior_tokenizer", "prior_text_encoder"),
        unclip_call,
        BATCHED,
    ),
    PipeCase(
        "sd_unclip_img2img",
        "sd",
        unclip("StableUnCLIPImg2ImgPipeline", "feature_extractor"),
        unclip_image_call,
        BATCHED,
    ),
    sdxl_case("sdxl", "StableDiffusionXLPipeline", text_call(pooled=True)),
    sdxl_case("sdxl_img2img", "StableDiffusionXLImg2ImgPipeline", without(text_call(pooled=True, **SOME), *SIZE)),
    sdxl_case("sdxl_inpaint", "StableDiffusionXLInpaintPipeline", text_call(pooled=True, **INPAINT)),
    kolors_case("kolors", "KolorsPipeline", text_call(pooled=True)),
    kolors_case("kolors_img2img", "KolorsImg2ImgPipeline", text_call(pooled=True, **SOME)),
    sd_case(
        "lcm", "LatentConsistencyModelPipeline", functools.partial(lcm_call, **size(PIXELS)), lcm_unet, "image_encoder",
        modes=SINGLE, scheduler=lcm,
    ),
    sd_case(
        "lcm_img2img", "LatentConsistencyModelImg2ImgPipeline",
        lambda prompts, cfg: lcm_call(prompts, cfg, image=pictures(prompts), strength=0.9), lcm_unet, "image_encoder",
        modes=SINGLE, scheduler=lcm,
    ),
)  # fmt: skip
BY_PICTURE = {case.name: case for case in PICTURE_PIPES}
