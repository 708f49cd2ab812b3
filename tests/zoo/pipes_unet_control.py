"""Tiny stock pipelines with a ControlNet or a T2I-Adapter beside the UNet."""

import functools

import diffusers

from zoo.family import randomise, rows
from zoo.image_calls import picture
from zoo.pipes import BATCHED, PipeCase, embeds, size
from zoo.pipes_unet_picture import (
    BY_PICTURE,
    CHECKER,
    INPAINT,
    PIXELS,
    SIZE,
    SOME,
    XL,
    around,
    pictures,
    text_call,
    without,
    xl_vae,
)
from zoo.unet import FRAMES, motion
from zoo.unet_picture import TEXT_WIDTH, sd, sdxl


def net(kind: str, unet=sd):
    """A random ControlNet of the denoiser's shape."""
    return lambda: randomise(getattr(diffusers, kind).from_unet(unet(), load_weights_from_unet=False), 5)


def union_net():
    """Its pictures go through a transformer, whose width is not taken from the UNet."""
    made = diffusers.ControlNetUnionModel.from_unet(sdxl(), load_weights_from_unet=False)
    small = {"num_trans_channel": 16, "num_trans_head": 2, "num_proj_channel": 16}
    return randomise(diffusers.ControlNetUnionModel(**{**made.config, **small}), 5)


def adapter():
    """It gives one picture for each block of the way down."""
    return randomise(diffusers.T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=8), 5)


def xl_adapter():
    """One more, which is added behind the middle."""
    made = diffusers.T2IAdapter(
        channels=[16, 32, 32, 32], num_res_blocks=1, downscale_factor=16, adapter_type="full_adapter_xl"
    )
    made.adapter.body[2].downsample = None
    return randomise(made, 5)


def sd_case(name, cls, call, **config):
    config = {"controlnet": net("ControlNetModel"), **CHECKER, **config}
    return PipeCase(name, "sd", around(cls, sd, **config), call, BATCHED)


def sdxl_case(name, cls, call, side=None, **config):
    config = {"controlnet": side or net("ControlNetModel", sdxl), "add_watermarker": False, **config}
    return PipeCase(name, "sdxl", around(cls, sdxl, *XL, vae=xl_vae, **config), call, BATCHED)


def with_mode(call):
    def made(num_prompts: int, cfg: bool):
        return {**call(num_prompts, cfg), "control_image": picture(PIXELS), "control_mode": 1}

    return made


CONTROL = {"control_image": pictures}
text = functools.partial(text_call, pooled=True)
some, part = without(text(**SOME, **CONTROL), *SIZE), text(**INPAINT, **CONTROL)

PICTURE_CONTROL_PIPES = (
    sd_case("sd_control", "StableDiffusionControlNetPipeline", text_call(image=pictures)),
    sd_case(
        "sd_control_img2img",
        "StableDiffusionControlNetImg2ImgPipeline",
        without(text_call(**SOME, **CONTROL), *SIZE),
    ),
    sd_case("sd_control_inpaint", "StableDiffusionControlNetInpaintPipeline", text_call(**INPAINT, **CONTROL)),
    sdxl_case("sdxl_control", "StableDiffusionXLControlNetPipeline", text(image=pictures)),
    sdxl_case("sdxl_control_img2img", "StableDiffusionXLControlNetImg2ImgPipeline", some),
    sdxl_case("sdxl_control_inpaint", "StableDiffusionXLControlNetInpaintPipeline", part),
    sdxl_case("sdxl_union", "StableDiffusionXLControlNetUnionPipeline", with_mode(text(**CONTROL)), union_net),
    sdxl_case(
        "sdxl_union_img2img",
        "StableDiffusionXLControlNetUnionImg2ImgPipeline",
        with_mode(some),
        union_net,
    ),
    sdxl_case(
        "sdxl_union_inpaint",
        "StableDiffusionXLControlNetUnionInpaintPipeline",
        with_mode(part),
        union_net,
    ),
    PipeCase(
        "sd_adapter",
        "sd",
        around("StableDiffusionAdapterPipeline", sd, adapter=adapter, **CHECKER),
        text_call(image=pictures),
        BATCHED,
    ),
    PipeCase(
        "sdxl_adapter",
        "sdxl",
        around("StableDiffusionXLAdapterPipeline", sdxl, *XL, vae=xl_vae, adapter=xl_adapter),
        text(image=pictures),
        BATCHED,
    ),
)


# -- IP-Adapter: further keys and values of the attention to the text -------------------------------------------------

PICTURE_WIDTH, PICTURE_TOKENS = 24, 4


def ip_weights(unet):
    """Random weights of an IP-Adapter, by the names in which they are published."""
    from diffusers.models.embeddings import ImageProjection

    projection = randomise(ImageProjection(PICTURE_WIDTH, TEXT_WIDTH, PICTURE_TOKENS), 6).state_dict()
    names = {"proj.weight": "image_embeds.weight", "proj.bias": "image_embeds.bias"}
    names |= {name: name for name in ("norm.weight", "norm.bias")}
    attentions = [m for name, m in unet.named_modules() if name.endswith("attn2")]
    keys = {
        f"{2 * number + 1}.to_{kind}_ip.weight": 0.15 * rows(attention.inner_dim, 20 + number, TEXT_WIDTH)
        for number, attention in enumerate(attentions)
        for kind in "kv"
    }
    return {"image_proj": {new: projection[old] for new, old in names.items()}, "ip_adapter": keys}


def with_picture(case):
    def make(seed: int):
        pipe = case.make(seed)
        pipe.unet._load_ip_adapter_weights([ip_weights(pipe.unet)])
        return pipe

    def call(num_prompts: int, cfg: bool):
        embeddings = [rows(1 + cfg, 9, 1, PICTURE_WIDTH)]  # it repeats them for every prompt
        return {**case.call(num_prompts, cfg), "ip_adapter_image_embeds": embeddings}

    return PipeCase(f"{case.name}_ip", case.family, make, call, case.cfg_modes)


IP_PIPES = tuple(with_picture(BY_PICTURE[name]) for name in ("sd", "sdxl", "sdxl_inpaint"))


# -- AnimateDiff: what the side network gives is for every frame -------------------------------------------------------


def animated(cls, controlnet):
    return around(cls, motion, motion_adapter=None, controlnet=controlnet)


def flat():
    """A UNet of the motion model's shape, without time."""
    return sd(block_out_channels=(16, 16))


def frames_call(**more):
    def call(num_prompts: int, cfg: bool):
        return {
            **embeds(num_prompts, cfg),
            **size(PIXELS),
            "num_frames": FRAMES,
            "guidance_scale": 5.0 if cfg else 1.0,
            "conditioning_frames": pictures(FRAMES),
            **{name: value(num_prompts) if callable(value) else value for name, value in more.items()},
        }

    return call


def sparse_net():
    return randomise(
        diffusers.SparseControlNetModel(
            block_out_channels=(16, 16),
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=24,
            num_attention_heads=2,
            motion_num_attention_heads=2,
            motion_max_seq_length=8,
            conditioning_channels=4,
            use_simplified_condition_embedding=True,
        ),
        5,
    )


ANIMATED_PIPES = (
    PipeCase(
        "animatediff_control",
        "animatediff",
        animated("AnimateDiffControlNetPipeline", net("ControlNetModel", flat)),
        frames_call(),
        BATCHED,
    ),
    PipeCase(
        "animatediff_control_video",
        "animatediff",
        animated("AnimateDiffVideoToVideoControlNetPipeline", net("ControlNetModel", flat)),
        without(
            frames_call(strength=0.6, num_inference_steps=5, video=lambda number: pictures(FRAMES)),
            "num_frames",
        ),
        BATCHED,
    ),
    PipeCase(
        "animatediff_sparse",
        "animatediff",
        animated("AnimateDiffSparseControlNetPipeline", sparse_net),
        without(frames_call(conditioning_frames=lambda number: pictures(2), controlnet_frame_indices=[0, 2])),
        BATCHED,
    ),
)
UNET_CONTROL_PIPES = (*PICTURE_CONTROL_PIPES, *IP_PIPES, *ANIMATED_PIPES)
