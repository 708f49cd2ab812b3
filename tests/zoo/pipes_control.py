"""Tiny stock image pipelines with a ControlNet, or with a picture beside the latents that they keep to."""

import warnings

import diffusers
import torch

from zoo.family import randomise
from zoo.image_calls import (
    MASK,
    flux_call,
    hunyuan_dit_call,
    picture,
    qwen_call,
    sd3_inpaint_call,
    text_call,
)
from zoo.pipes import BATCHED, MODELS, SD3_TEXT, SINGLE, TWO_CALLS, PipeCase, flow, sd3_call
from zoo.pipes_image import BINNING, FLUX_TEXT, around, ddim, deep_vae, image_vae, qwen_vae, shifted, wider


def controlled(cls: str, family: str, net, *absent: str, scheduler=flow, vae=image_vae, **config):
    """A pipeline whose ControlNet is a random one of the denoiser's shape, made from its config."""

    def make(seed: int) -> diffusers.DiffusionPipeline:
        torch.manual_seed(seed)
        with warnings.catch_warnings():  # diffusers' own use of a class that it deprecates
            warnings.simplefilter("ignore", FutureWarning)
            side = randomise(net(MODELS[family].build(seed)), seed + 5)
        return around(cls, family, scheduler, *absent, vae=vae, controlnet=side, **config)(seed)

    return make


def flux_net(model):
    size = {"num_attention_heads": model.config.num_attention_heads, "attention_head_dim": 16}
    return diffusers.FluxControlNetModel.from_transformer(
        model, num_layers=2, num_single_layers=1, load_weights_from_transformer=False, **size
    )


def sd3_net(model):
    return diffusers.SD3ControlNetModel.from_transformer(
        model, num_layers=2, num_extra_conditioning_channels=0, load_weights_from_transformer=False
    )


def sd3_inpaint_net(model):
    """It sees the mask as a further channel."""
    return diffusers.SD3ControlNetModel.from_transformer(
        model, num_layers=2, num_extra_conditioning_channels=1, load_weights_from_transformer=False
    )


def qwen_net(extra=0):
    def net(model):
        sizes = {"attention_head_dim": 16, "num_attention_heads": 2}
        return diffusers.QwenImageControlNetModel.from_transformer(
            model, num_layers=2, load_weights_from_transformer=False, extra_condition_channels=extra, **sizes
        )

    return net


def hunyuan_dit_net(model):
    """It gives one residual for each long skip of the transformer."""
    return diffusers.HunyuanDiT2DControlNetModel.from_transformer(
        model, transformer_num_layers=6, load_weights_from_transformer=False
    )


def sana_net(model):
    same = ("in_channels", "out_channels", "num_attention_heads", "attention_head_dim", "num_cross_attention_heads")
    same += ("cross_attention_head_dim", "cross_attention_dim", "caption_channels", "sample_size")
    config = {name: getattr(model.config, name) for name in same}
    return diffusers.SanaControlNetModel(num_layers=2, patch_size=1, **config)


def with_control(call, name="control_image", **more):
    def made(num_prompts: int, cfg: bool):
        return {**call(num_prompts, cfg), name: picture(), **more}

    return made


def flux_distilled(num_prompts: int, cfg: bool):
    call = flux_call(num_prompts, False, image=picture(), control_image=picture(), strength=1.0)
    del call["true_cfg_scale"]
    return call


def flux_distilled_inpaint(num_prompts: int, cfg: bool):
    return {**flux_distilled(num_prompts, cfg), "mask_image": picture().convert("L")}


def sd3_control_inpaint(num_prompts: int, cfg: bool):
    call = sd3_inpaint_call(num_prompts, cfg)
    mask, image = call.pop("mask_image"), call.pop("image")
    del call["strength"]
    return {**call, "control_image": image, "control_mask": mask}


CONTROL_PIPES = (
    PipeCase(
        "flux_controlnet",
        "flux",
        controlled("FluxControlNetPipeline", "flux", flux_net, *FLUX_TEXT),
        with_control(flux_call),
        TWO_CALLS,
    ),
    PipeCase(
        "flux_controlnet_img2img",
        "flux",
        controlled("FluxControlNetImg2ImgPipeline", "flux", flux_net, *FLUX_TEXT),
        flux_distilled,
        SINGLE,
    ),
    PipeCase(
        "flux_controlnet_inpaint",
        "flux",
        controlled("FluxControlNetInpaintPipeline", "flux", flux_net, *FLUX_TEXT),
        flux_distilled_inpaint,
        SINGLE,
    ),
    PipeCase(
        "sd3_controlnet",
        "sd3",
        controlled("StableDiffusion3ControlNetPipeline", "sd3", sd3_net, *SD3_TEXT, scheduler=shifted),
        with_control(sd3_call),
        BATCHED,
    ),
    PipeCase(
        "sd3_controlnet_inpaint",
        "sd3",
        controlled(
            "StableDiffusion3ControlNetInpaintingPipeline", "sd3", sd3_inpaint_net, *SD3_TEXT, scheduler=shifted
        ),
        sd3_control_inpaint,
        BATCHED,
    ),
    PipeCase(
        "qwen_controlnet",
        "qwen_image",
        controlled("QwenImageControlNetPipeline", "qwen_image", qwen_net(), vae=qwen_vae),
        with_control(qwen_call),
        TWO_CALLS,
    ),
    PipeCase(
        "qwen_controlnet_inpaint",
        "qwen_image",
        controlled("QwenImageControlNetInpaintPipeline", "qwen_image", qwen_net(4), vae=qwen_vae),
        with_control(qwen_call, control_mask=picture().convert("L")),
        TWO_CALLS,
    ),
    PipeCase(
        "hunyuan_dit_controlnet",
        "hunyuan_dit",
        controlled(
            "HunyuanDiTControlNetPipeline",
            "hunyuan_dit",
            hunyuan_dit_net,
            *FLUX_TEXT,
            "safety_checker",
            "feature_extractor",
            scheduler=ddim,
            requires_safety_checker=False,
        ),
        with_control(hunyuan_dit_call),
        BATCHED,
    ),
    PipeCase(
        "sana_controlnet",
        "sana",
        controlled("SanaControlNetPipeline", "sana", sana_net, scheduler=shifted, vae=deep_vae),
        with_control(text_call(64, 4.5, mask=MASK, negative_prompt=None, **BINNING)),
        BATCHED,
    ),
    PipeCase(
        "cogview4_control",
        "cogview4",
        around("CogView4ControlPipeline", "cogview4", vae=image_vae, model=wider("cogview4", 8, 4)),
        with_control(text_call(64, 5.0)),
        TWO_CALLS,
    ),
)
BY_CONTROL = {case.name: case for case in CONTROL_PIPES}
