"""Tiny stock pipelines around one stream with cross-attention to the text."""

import functools
from collections.abc import Callable

import diffusers
import torch

from zoo.family import TEXT, rows
from zoo.pipes import cog_ddim, embeds, flow, size, unipc
from zoo.video_case import StandIn, VideoCase, a_vae, latents, picture, text
from zoo.video_cross import cosmos, kandinsky5


def allegro_call(clips: int, cfg: bool):
    return {**text(clips, cfg, 7.5, mask="prompt_attention_mask"), "negative_prompt": None, "clean_caption": False}


def ltx_condition_call(clips: int, cfg: bool):
    call = embeds(clips, cfg, mask="prompt_attention_mask") | size(96, 9)
    return {**call, "guidance_scale": 3.0 if cfg else 1.0, **latents(clips, 8, 2, 3, 3)}


class Harmless:
    """In place of NVIDIA's guardrail."""

    def to(self, device: object) -> None: ...

    def check_text_safety(self, prompt: str) -> bool:
        return True


def harmless(**vae: object) -> Callable[[], dict[str, object]]:
    return lambda: {"safety_checker": Harmless(), "vae": StandIn(**vae) if vae else None}


def cosmos_call(clips: int, cfg: bool):
    return {**text(clips, cfg, 6.0), "num_frames": 9}


def cosmos2_image_call(clips: int, cfg: bool):
    return {**text(clips, cfg, 6.0), "num_frames": ...}


def cosmos2_call(clips: int, cfg: bool):
    return {**text(clips, cfg, 6.0), "image": picture()}


def cosmos2():
    return cosmos(in_channels=5)


def sana_call(clips: int, cfg: bool):
    call = text(clips, cfg, 6.0, mask="prompt_attention_mask") | size(64)
    return {**call, "negative_prompt": None, "num_frames": ..., "frames": 5, "use_resolution_binning": False}


def kandinsky5_call(clips: int, cfg: bool):
    call: dict[str, object] = {**size(64, 5), "guidance_scale": 5.0 if cfg else 1.0}
    for seed, prefix in ((1, ""), (2, "negative_"))[: 1 + cfg]:
        call[f"{prefix}prompt_embeds_qwen"] = rows(clips, seed, TEXT, 24)
        call[f"{prefix}prompt_embeds_clip"] = rows(clips, seed + 10, 12)
        call[f"{prefix}prompt_cu_seqlens"] = torch.arange(clips + 1, dtype=torch.int32) * TEXT
    return call


karras = functools.partial(flow, use_karras_sigmas=True)


def sana_i2v_call(clips: int, cfg: bool):
    return {**sana_call(clips, cfg), "image": picture(64)}


def kandinsky5_image_call(clips: int, cfg: bool):
    return {**kandinsky5_call(clips, cfg), "num_frames": ...}


def kandinsky5_i2v_call(clips: int, cfg: bool):
    """Six latent frames: the first four are brought to the deviation of the others."""
    return {**kandinsky5_call(clips, cfg), "image": picture(64), "num_frames": 21}


def small_pictures(pipe: object) -> None:
    pipe.resolutions = [(64, 64)]


def kandinsky5_i2i_call(clips: int, cfg: bool):
    return {**kandinsky5_image_call(clips, cfg), "image": picture(64)}


def kandinsky5_conditioned():
    return kandinsky5(visual_cond=True)


SANA_FLOW = functools.partial(flow, shift=3.0)


CROSS_PIPES = (
    VideoCase("allegro", "AllegroPipeline", "allegro", allegro_call, "batched", (7.5,), cog_ddim),
    VideoCase(
        "ltx_condition",
        "LTXConditionPipeline",
        "ltx",
        ltx_condition_call,
        "batched",
        (3.0,),
        parts=a_vae(channels=8, time=8, space=32),
    ),
    VideoCase(
        "cosmos",
        "CosmosTextToWorldPipeline",
        "cosmos",
        cosmos_call,
        "two_calls",
        (7.0,),
        diffusers.EDMEulerScheduler,
        harmless(),
    ),
    VideoCase(
        "cosmos2_image",
        "Cosmos2TextToImagePipeline",
        "cosmos",
        cosmos2_image_call,
        "two_calls",
        (7.0,),
        karras,
        parts=harmless(channels=4),
    ),
    VideoCase(
        "cosmos2",
        "Cosmos2VideoToWorldPipeline",
        "cosmos",
        cosmos2_call,
        "two_calls",
        (7.0,),
        karras,
        parts=harmless(channels=4),
        model=cosmos2,
        clips=1,
    ),
    VideoCase(
        "cosmos25",
        "Cosmos2_5_PredictBasePipeline",
        "cosmos",
        cosmos2_call,
        "two_calls",
        (7.0,),
        unipc,
        harmless(channels=4),
        cosmos2,
        clips=1,
    ),
    VideoCase("sana_video", "SanaVideoPipeline", "sana_video", sana_call, "batched", (6.0,), SANA_FLOW),
    VideoCase("kandinsky5", "Kandinsky5T2VPipeline", "kandinsky5", kandinsky5_call, "two_calls", (5.0,)),
    VideoCase(
        "sana_i2v",
        "SanaImageToVideoPipeline",
        "sana_video",
        sana_i2v_call,
        "batched",
        (6.0,),
        SANA_FLOW,
        a_vae(),
        lone=False,
    ),
    VideoCase(
        "kandinsky5_image",
        "Kandinsky5T2IPipeline",
        "kandinsky5",
        kandinsky5_image_call,
        "two_calls",
        (5.0,),
        lone=False,
        ready=small_pictures,
    ),
    VideoCase(
        "kandinsky5_i2v",
        "Kandinsky5I2VPipeline",
        "kandinsky5",
        kandinsky5_i2v_call,
        "two_calls",
        (5.0,),
        parts=a_vae(),
        model=kandinsky5_conditioned,
        clips=1,
        lone=False,
    ),
    VideoCase(
        "kandinsky5_i2i",
        "Kandinsky5I2IPipeline",
        "kandinsky5",
        kandinsky5_i2i_call,
        "two_calls",
        (5.0,),
        parts=a_vae(),
        model=kandinsky5_conditioned,
        clips=1,
        lone=False,
        ready=small_pictures,
    ),
    VideoCase(
        "cosmos_v2w",
        "CosmosVideoToWorldPipeline",
        "cosmos",
        cosmos2_call,
        "two_calls",
        (7.0,),
        diffusers.EDMEulerScheduler,
        harmless(channels=4),
        cosmos2,
        clips=1,
        lone=False,
    ),
)
