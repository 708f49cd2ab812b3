"""Tiny stock image pipelines with a ControlNet, and those that edit a picture."""

import importlib
import warnings

import diffusers
import torch

from zoo.family import randomise
from zoo.image_calls import flux_call, picture, qwen_call, sd3_inpaint_call
from zoo.pipes import BATCHED, MODELS, SD3_TEXT, SINGLE, TWO_CALLS, PipeCase, flow, sd3_call
from zoo.pipes_image import FLUX_TEXT, around, image_vae, qwen_vae, shifted


def controlled(cls: str, family: str, net, *absent: str, scheduler=flow, vae=image_vae):
    """A pipeline whose ControlNet is a random one of the denoiser's shape, made from its config."""

    def make(seed: int) -> diffusers.DiffusionPipeline:
        torch.manual_seed(seed)
        with warnings.catch_warnings():  # diffusers' own use of a class that it deprecates
            warnings.simplefilter("ignore", FutureWarning)
            side = randomise(net(MODELS[family].build(seed)), seed + 5)
        return around(cls, family, scheduler, *absent, vae=vae, controlnet=side)(seed)

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


def small_edits(cls: str, module: str, sides: tuple[int | None, ...]):
    """An editing pipeline whose pictures have 64 pixels a side, not the area of a million that it scales them to."""

    def make(seed: int) -> diffusers.DiffusionPipeline:
        home = importlib.import_module(f"diffusers.pipelines.qwenimage.{module}")
        home.calculate_dimensions = lambda area, ratio: sides
        return around(cls, "qwen_image", flow, "processor", vae=qwen_vae)(seed)

    return make


def with_control(call, name="control_image", **more):
    def made(num_prompts: int, cfg: bool):
        return {**call(num_prompts, cfg), name: picture(), **more}

    return made


def edit_call(num_prompts: int, cfg: bool):
    return {**qwen_call(num_prompts, cfg), "image": picture()}


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
        "qwen_edit",
        "qwen_image",
        small_edits("QwenImageEditPipeline", "pipeline_qwenimage_edit", (64, 64, None)),
        edit_call,
        TWO_CALLS,
    ),
    PipeCase(
        "qwen_edit_plus",
        "qwen_image",
        small_edits("QwenImageEditPlusPipeline", "pipeline_qwenimage_edit_plus", (64, 64)),
        edit_call,
        TWO_CALLS,
    ),
)
BY_CONTROL = {case.name: case for case in CONTROL_PIPES}
