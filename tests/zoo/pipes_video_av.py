"""Tiny stock pipelines that make video and sound."""

import functools

import diffusers
import torch
from torch import Tensor, nn

from zoo.family import TEXT, randomise, rows
from zoo.pipes import embeds, size
from zoo.video_av import ltx2
from zoo.video_case import StandIn, VideoCase, picture


class Connectors(nn.Module):
    """In place of LTX-2's text connectors: the embeddings go to both streams."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, text: Tensor, mask: Tensor, padding_side: str = "left"):
        return text, text + 0.5, mask


def ltx2_parts():
    return {"vae": StandIn(8, 8, 32), "audio_vae": AudioStandIn(), "connectors": Connectors(), "vocoder": None}


class AudioStandIn(StandIn):
    """In place of an audio VAE."""

    def __init__(self) -> None:
        super().__init__(4)
        self.mel_compression_ratio, self.temporal_compression_ratio, self.latent_hop_length = 1, 4, 4000
        self.latents_mean, self.latents_std = torch.zeros(8), torch.ones(8)
        self.config.sample_rate, self.config.mel_hop_length = 16000, 1000


def ltx2_call(clips: int, cfg: bool, **own: object):
    """Another scale for the sound; without the pipeline's own skip and modality passes unless asked."""
    call = embeds(clips, cfg, mask="prompt_attention_mask") | size(96, 9)
    scales = {"guidance_scale": 3.0 if cfg else 1.0, "audio_guidance_scale": 5.0 if cfg else 1.0}
    off = {"stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
    off |= {f"audio_{name}": value for name, value in off.items()}
    return {**call, **scales, **off, "frame_rate": 24.0, **own}


ltx2_own_call = functools.partial(
    ltx2_call,
    stg_scale=0.7,
    audio_stg_scale=0.6,
    modality_scale=2.0,
    audio_modality_scale=1.5,
    spatio_temporal_guidance_blocks=[0],
)


ltx2_rescaled_call = functools.partial(ltx2_own_call, guidance_rescale=0.7, audio_guidance_rescale=0.4)


def kandinsky6_call(clips: int, cfg: bool, sound: bool = True):
    call: dict[str, object] = {**size(48, 5), "guidance_scale": 5.0 if cfg else 1.0, "sample_audio": sound}
    for seed, prefix in ((1, ""), (2, "negative_"))[: 1 + cfg]:
        call[f"{prefix}prompt_embeds"] = rows(clips, seed, TEXT, 24)
        call[f"{prefix}pooled_prompt_embeds"] = rows(clips, seed + 10, 12)
    return call


kandinsky6_silent_call = functools.partial(kandinsky6_call, sound=False)


def ltx2_i2v_call(clips: int, cfg: bool):
    return {**ltx2_own_call(clips, cfg), "image": picture(96), "image_crf": 0}


def ltx2_hdr_call(clips: int, cfg: bool):
    """LTX2HDRPipeline has no scales of its own for the sound."""
    return {name: value for name, value in ltx2_own_call(clips, cfg).items() if not name.startswith("audio_")}


def left_padded(pipe: object) -> None:
    """What the pipeline reads off its tokenizer."""
    pipe.tokenizer_padding_side = "left"


def ltx2_dfr_call(clips: int, cfg: bool):
    """Distilled: one pass a step. The keyframes' slots need what LTX-2.5 has."""
    call = embeds(clips, cfg=False, mask="prompt_attention_mask") | size(96, 9)
    return {**call, "frame_rate": 24.0, "generate_slots": False, "sigmas": [1.0, 0.7, 0.3], "num_inference_steps": ...}


class TwiceTheFrames(nn.Module):
    """In place of LTX-2's temporal upsampler."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, latents: Tensor):
        return latents.repeat_interleave(2, dim=2)[:, :, :-1]


def refine_pipe():
    """LTX2DFRTemporalRefinePipeline: distilled, and every piece of the video goes through its own table of steps."""
    from diffusers.schedulers import LTXEulerAncestralRFScheduler

    gates = {"gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True, "audio_cross_attn_mod": True}
    model = randomise(ltx2(**gates, use_keyframes_abs_pos_embedding=True), 1)
    parts = {"text_encoder": None, "tokenizer": None, "temporal_latent_upsampler": TwiceTheFrames(), **ltx2_parts()}
    scheduler = LTXEulerAncestralRFScheduler(eta=0.5)
    pipe = diffusers.LTX2DFRTemporalRefinePipeline(transformer=model, scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_refine(pipe: object, sigmas: tuple[float, ...] = (0.7, 0.3)) -> Tensor:
    """Two pieces of 17 frames."""
    own = {
        "latents": rows(1, 5, 8, 3, 3, 3),
        "keyframes_latents": rows(1, 6, 8, 2, 3, 3),
        "keyframe_positions": [8, 16],
    }
    call = {**embeds(1, cfg=False, mask="prompt_attention_mask"), **size(96, 17), "frame_rate": 24.0, **own}
    noise = {"audio_latents": rows(1, 7, 8, 6, 1), "generator": torch.Generator().manual_seed(1)}
    return pipe(**call, **noise, sigmas=list(sigmas), output_type="latent", return_dict=False)[0]


AUDIO_PIPES = (
    VideoCase(
        "kandinsky6",
        "Kandinsky6TI2VAPipeline",
        "kandinsky6",
        kandinsky6_call,
        "two_calls",
        (5.0, 5.0),
        parts=lambda: {"audio_vae": AudioStandIn(), "vocoder": Connectors()},
        layer=2,
    ),
    VideoCase(
        "kandinsky6_silent",
        "Kandinsky6TI2VAPipeline",
        "kandinsky6",
        kandinsky6_silent_call,
        "two_calls",
        (5.0,),
        layer=2,
    ),
    VideoCase("ltx2", "LTX2Pipeline", "ltx2", ltx2_call, "batched", (3.0, 5.0), parts=ltx2_parts),
    VideoCase(
        "ltx2_own", "LTX2Pipeline", "ltx2_gated", ltx2_own_call, "batched", (3.0, 5.0), parts=ltx2_parts, native=True
    ),
    VideoCase(
        "ltx2_rescaled",
        "LTX2Pipeline",
        "ltx2_gated",
        ltx2_rescaled_call,
        "batched",
        (3.0, 5.0),
        parts=ltx2_parts,
        native=True,
        lone=False,
    ),
    VideoCase(
        "ltx2_i2v",
        "LTX2ImageToVideoPipeline",
        "ltx2_gated",
        ltx2_i2v_call,
        "batched",
        (3.0, 5.0),
        parts=ltx2_parts,
        native=True,
        lone=False,
    ),
    VideoCase(
        "ltx2_condition",
        "LTX2ConditionPipeline",
        "ltx2_gated",
        ltx2_own_call,
        "batched",
        (3.0, 5.0),
        parts=ltx2_parts,
        native=True,
        lone=False,
    ),
    VideoCase(
        "ltx2_in_context",
        "LTX2InContextPipeline",
        "ltx2_gated",
        ltx2_own_call,
        "batched",
        (3.0, 5.0),
        parts=ltx2_parts,
        native=True,
        lone=False,
    ),
    VideoCase(
        "ltx2_hdr",
        "LTX2HDRPipeline",
        "ltx2_gated",
        ltx2_hdr_call,
        "batched",
        (3.0,),
        parts=ltx2_parts,
        native=True,
        ready=left_padded,
    ),
    VideoCase("ltx2_dfr", "LTX2DFRPipeline", "ltx2_gated", ltx2_dfr_call, "single", (1.0, 1.0), parts=ltx2_parts),
)
AUDIO_PIPES = tuple(case for case in AUDIO_PIPES if hasattr(diffusers, case.cls))  # an older one lacks some
