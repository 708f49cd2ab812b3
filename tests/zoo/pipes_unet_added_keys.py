"""Tiny stock pipelines of Kandinsky 2 and DeepFloyd IF: one attention over picture and text, and learned variances."""

import functools

import diffusers
import torch

from zoo.family import TEXT, rows
from zoo.image_calls import picture
from zoo.pipes import BATCHED, PipeCase, embeds, size
from zoo.pipes_unet_picture import PIXELS, SOME, W, around
from zoo.unet_picture import IMAGE, TEXT_WIDTH, added_keys, kandinsky

SMALL = 16
learned = functools.partial(diffusers.DDPMScheduler, variance_type="learned_range", clip_sample=False)


def movq():
    return diffusers.VQModel(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        num_vq_embeddings=12,
        vq_embed_dim=4,
        norm_num_groups=4,
    ).eval()


def small_pictures(make):
    """Its decoder hides differences, so that what is decoded is made small instead."""

    def made(seed: int):
        pipe = make(seed)
        pipe.movq.decode = lambda latents, **_: {"sample": latents / 100}
        return pipe

    return made


# -- Kandinsky 2.1: text and picture ---------------------------------------------------------------------------------


def kandinsky21(**config):
    """The middle of it is embedded by both."""
    return added_keys(
        encoder_hid_dim=TEXT_WIDTH,
        encoder_hid_dim_type="text_image_proj",
        addition_embed_type="text_image",
        resnet_time_scale_shift="scale_shift",
        cross_attention_dim=IMAGE,
        **config,
    )


def kandinsky21_case(name, cls, call, unet=kandinsky21):
    def make(seed: int):
        pipe = around(cls, unet, vae=None, movq=movq, scheduler=learned)(seed)

        def encode(prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative_prompt=None):
            batch, dtype = (1 + do_classifier_free_guidance) * len(prompt), pipe.unet.dtype
            text = rows(batch, 1, TEXT, TEXT_WIDTH).to(dtype)
            return rows(batch, 3, IMAGE).to(dtype), text, torch.ones(batch, TEXT, dtype=torch.bool)

        pipe._encode_prompt = encode
        return pipe

    def called(num_prompts: int, cfg: bool):
        return {"prompt": ["a tram"] * num_prompts, **call(num_prompts, cfg)}

    return PipeCase(name, "kandinsky2", small_pictures(make), called, BATCHED)


def image_call(output: str = "latent", w: float = 4.0, **more):
    """The embedding of the picture that a prior has predicted, and that of none."""

    def call(num_prompts: int, cfg: bool):
        return {
            "image_embeds": rows(num_prompts, 1, IMAGE),
            "negative_image_embeds": rows(num_prompts, 2, IMAGE),
            **size(PIXELS),
            "guidance_scale": w if cfg else 1.0,
            "output_type": output,
            **{name: value(num_prompts) if callable(value) else value for name, value in more.items()},
        }

    return call


def hints(number: int):
    return rows(number, 6, 3, PIXELS, PIXELS) / 1000


def hinted():
    """The picture of depths becomes further channels of its input."""
    return kandinsky(addition_embed_type="image_hint", in_channels=8)


def kandinsky22_case(name, cls, call, unet=kandinsky):
    make = around(cls, unet, vae=None, text=False, movq=movq, scheduler=learned)
    return PipeCase(name, "kandinsky2", small_pictures(make), call, BATCHED)


def tensors(number: int):
    return rows(number, 7, 3, PIXELS, PIXELS).tanh()


def triangles(number: int):
    return torch.ones(PIXELS, PIXELS).tril().repeat(number, 1, 1, 1)


MASK = {"image": tensors, "mask_image": triangles}

KANDINSKY_PIPES = (
    kandinsky21_case("kandinsky21", "KandinskyPipeline", image_call("pt")),
    kandinsky21_case("kandinsky21_img2img", "KandinskyImg2ImgPipeline", image_call("pt", **SOME)),
    kandinsky21_case(
        "kandinsky21_inpaint",
        "KandinskyInpaintPipeline",
        image_call("pt", **MASK),
        functools.partial(kandinsky21, in_channels=9),
    ),
    kandinsky22_case("kandinsky22", "KandinskyV22Pipeline", image_call()),
    kandinsky22_case("kandinsky22_img2img", "KandinskyV22Img2ImgPipeline", image_call(**SOME)),
    kandinsky22_case(
        "kandinsky22_inpaint",
        "KandinskyV22InpaintPipeline",
        image_call(**MASK),
        functools.partial(kandinsky, in_channels=9),
    ),
    kandinsky22_case("kandinsky22_control", "KandinskyV22ControlnetPipeline", image_call("pt", hint=hints), hinted),
    kandinsky22_case(
        "kandinsky22_control_img2img",
        "KandinskyV22ControlnetImg2ImgPipeline",
        image_call("pt", hint=hints, **SOME),
        hinted,
    ),
)


# -- DeepFloyd IF: pixels ---------------------------------------------------------------------------------------------


def deepfloyd(**config):
    return added_keys(
        **{
            "in_channels": 3,
            "out_channels": 6,
            "encoder_hid_dim": TEXT_WIDTH,
            "encoder_hid_dim_type": "text_proj",
            "addition_embed_type": "text",
            "addition_embed_type_num_heads": 2,
            "cross_attention_norm": "group_norm",
            "cross_attention_dim": 32,
            **config,
        }
    )


def above():
    """A stage above: it sees the small picture beside its own, and how much noise there is on that."""
    return deepfloyd(in_channels=6, class_embed_type="timestep")


def deepfloyd_case(name, cls, unet=deepfloyd, **more):
    config = {"image_noising_scheduler": diffusers.DDPMScheduler} if unet is above else {}
    absent = ("safety_checker", "feature_extractor", "watermarker")
    make = around(cls, unet, *absent, vae=None, requires_safety_checker=False, scheduler=learned, **config)

    def call(num_prompts: int, cfg: bool):
        own = {name: value(num_prompts) if callable(value) else value for name, value in more.items()}
        return {**embeds(num_prompts, cfg), "guidance_scale": W if cfg else 1.0, "output_type": "pt", **own}

    return PipeCase(name, "kandinsky2", make, call, BATCHED)


def small(number: int):
    return [picture(SMALL)] * number


def small_masks(number: int):
    return [picture(SMALL).convert("L")] * number


PART = {"strength": 0.6, "num_inference_steps": 5}
LEVEL = {"noise_level": 20}

IF_PIPES = (
    deepfloyd_case("if", "IFPipeline", **size(SMALL)),
    deepfloyd_case("if_img2img", "IFImg2ImgPipeline", image=small, **PART),
    deepfloyd_case("if_inpaint", "IFInpaintingPipeline", image=small, mask_image=small_masks, **PART),
    deepfloyd_case("if_super", "IFSuperResolutionPipeline", above, image=small, **size(SMALL), **LEVEL),
    deepfloyd_case(
        "if_super_img2img",
        "IFImg2ImgSuperResolutionPipeline",
        above,
        image=small,
        original_image=small,
        **PART,
        **LEVEL,
    ),
    deepfloyd_case(
        "if_super_inpaint",
        "IFInpaintingSuperResolutionPipeline",
        above,
        image=small,
        original_image=small,
        mask_image=small_masks,
        **PART,
        **LEVEL,
    ),
)
ADDED_KEYS_PIPES = (*KANDINSKY_PIPES, *IF_PIPES)
