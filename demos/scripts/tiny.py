"""Tiny random pipelines, for the `--tiny` form of the scripts: stock classes, the released depth, next to no width.

`from tiny import LTXPipeline` in place of `from diffusers import LTXPipeline`, and the script runs in seconds on a CPU:
`from_pretrained` gives a tiny pipeline, which takes sizes and steps of its own for those it is called with, and neither
offloads nor compiles.

Every function gives `(pipe, call)`, where `call` are the sizes and steps that suit it. The denoisers have as many
blocks as the released ones, so that the same layers can be named. There is no text encoder: a prompt is turned into
random numbers that depend on its words. What comes out is noise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from torch import Tensor

CHANNELS, TEXT, POOLED = 24, 7, 12  # of a token of the text, tokens, of the text as a whole
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
NO_TEXT = {"text_encoder": None, "tokenizer": None}
Made = tuple[Any, dict[str, Any]]


def words(prompt: str | None, *shape: int) -> Tensor:
    """What stands in for the text encoder: random numbers `[1, *shape]`, the same for the same words."""
    seed = sum(place * ord(letter) for place, letter in enumerate(prompt or "", start=1))
    return torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed))


def text(prompt: str | None) -> Tensor:
    return words(prompt, TEXT, CHANNELS)


def mask() -> Tensor:
    return torch.ones(1, TEXT, dtype=torch.long)


def ready(pipe: Any, encode: Any) -> Any:
    """Puts the stand-in of the text encoder in place, and keeps the steps quiet."""
    pipe.encode_prompt = encode
    pipe.set_progress_bar_config(disable=True)
    return pipe


def masked_pair(prompt: str | None, negative_prompt: str | None = None, **_: Any) -> tuple[Tensor, ...]:
    return text(prompt), mask(), text(negative_prompt), mask()


def pair(prompt: str | None, negative_prompt: str | None = None, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return text(prompt), text(negative_prompt)


def ltx() -> Made:
    """LTX-Video: 28 blocks."""
    torch.manual_seed(0)
    thin, one = (8,) * 4, (1,) * 5
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=thin,
        decoder_block_out_channels=thin,
        layers_per_block=one,
        decoder_layers_per_block=one,
    )
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_layers=28, cross_attention_dim=32, caption_channels=CHANNELS, **HEADS
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.LTXPipeline(vae=vae.eval(), transformer=transformer.eval(), scheduler=scheduler, **NO_TEXT)
    return ready(pipe, masked_pair), {"height": 96, "width": 96, "num_frames": 9, "num_inference_steps": 2}


def ltx2() -> Made:
    """LTX-2: 48 blocks that see pictures and sound."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 4,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=8, latent_channels=4, ch_mult=(1, 1, 1), num_res_blocks=1, mel_bins=8
    )
    heads = {f"{of}_connector_{name}": size for of in ("video", "audio") for name, size in HEADS.items()}
    connectors = LTX2TextConnectors(
        caption_channels=32,
        text_proj_in_factor=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_learnable_registers=None,
        **heads,
    )
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        audio_in_channels=8,
        audio_out_channels=8,
        num_layers=48,
        cross_attention_dim=32,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        caption_channels=32,
        perturbed_attn=True,
        **HEADS,
    )
    pipe = diffusers.LTX2Pipeline(
        vae=vae.eval(),
        audio_vae=audio_vae.eval(),
        connectors=connectors.eval(),
        transformer=transformer.eval(),
        vocoder=LTX2Vocoder(in_channels=16, hidden_channels=32).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        **NO_TEXT,
    )

    def encode(prompt: str | None, negative_prompt: str | None = None, **_: Any) -> tuple[Tensor, ...]:
        return words(prompt, TEXT, 32), mask(), words(negative_prompt, TEXT, 32), mask()

    return ready(pipe, encode), {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2}


def wan22() -> Made:
    """Wan 2.2 A14B: two denoisers of 40 blocks, one for high and one for low noise."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    high, low = (
        diffusers.WanTransformer3DModel(
            in_channels=4, out_channels=4, num_layers=40, text_dim=CHANNELS, freq_dim=32, ffn_dim=48, **HEADS
        ).eval()
        for _ in range(2)
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = diffusers.WanPipeline(
        vae=vae.eval(), transformer=high, transformer_2=low, boundary_ratio=0.875, scheduler=scheduler, **NO_TEXT
    )
    return ready(pipe, pair), {"height": 48, "width": 48, "num_frames": 5, "num_inference_steps": 3}


def hunyuan15() -> Made:
    """HunyuanVideo 1.5: 54 blocks, and a guider as a component."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1)
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_layers=54,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=CHANNELS,
        text_embed_2_dim=POOLED,
        image_embed_dim=20,
        rope_axes_dim=(4, 6, 6),
        target_size=48,
        task_type="t2v",
        **HEADS,
    )
    pipe = diffusers.HunyuanVideo15Pipeline(
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=6.0),
        text_encoder_2=None,
        tokenizer_2=None,
        **NO_TEXT,
    )
    pipe.vision_num_semantic_tokens = 3  # hundreds of them, all empty, would be most of the work

    def encode(prompt: str | None, prompt_embeds: Tensor | None = None, **_: Any) -> tuple[Tensor, ...]:
        return text(prompt), mask(), words(prompt, 4, POOLED), torch.ones(1, 4, dtype=torch.long)

    return ready(pipe, encode), {"height": 48, "width": 48, "num_frames": 5, "num_inference_steps": 2}


def cogvideox() -> Made:
    """CogVideoX 2B: 30 blocks."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLCogVideoX(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2
    )
    transformer = diffusers.CogVideoXTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_layers=30,
        time_embed_dim=24,
        text_embed_dim=CHANNELS,
        max_text_seq_length=TEXT,
        sample_width=6,
        sample_height=6,
        sample_frames=9,
        **HEADS,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    pipe = diffusers.CogVideoXPipeline(vae=vae.eval(), transformer=transformer.eval(), scheduler=scheduler, **NO_TEXT)
    return ready(pipe, pair), {"height": 48, "width": 48, "num_frames": 9, "num_inference_steps": 2}


def picture_vae() -> Any:
    """The autoencoder of Flux and SD3.5."""
    return diffusers.AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def flux() -> Made:
    """Flux: 19 blocks with two streams and 38 with one."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=19,
        num_single_layers=38,
        joint_attention_dim=CHANNELS,
        pooled_projection_dim=POOLED,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
        **HEADS,
    )
    pipe = diffusers.FluxPipeline(
        vae=picture_vae(),
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder_2=None,
        tokenizer_2=None,
        **NO_TEXT,
    )

    def encode(prompt: str | None, **_: Any) -> tuple[Tensor, ...]:
        return text(prompt), words(prompt, POOLED), torch.zeros(TEXT, 3)

    return ready(pipe, encode), {"height": 64, "width": 64, "num_inference_steps": 2}


def sd35() -> Made:
    """Stable Diffusion 3.5 medium: 24 blocks, a second attention in the first 13."""
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=24,
        joint_attention_dim=CHANNELS,
        caption_projection_dim=32,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=8,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
        **HEADS,
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        vae=picture_vae(),
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
        **NO_TEXT,
    )

    def encode(prompt: str | None, negative_prompt: str | None = None, **_: Any) -> tuple[Tensor, ...]:
        return text(prompt), text(negative_prompt), words(prompt, POOLED), words(negative_prompt, POOLED)

    # Step 1 of 6 is the one in the window of the skipped layers, which is 0.01 to 0.2 of the steps.
    return ready(pipe, encode), {"height": 64, "width": 64, "num_inference_steps": 6}


def qwen_image() -> Made:
    """Qwen-Image: 60 blocks."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=60, joint_attention_dim=CHANNELS, axes_dims_rope=(4, 6, 6), **HEADS
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = diffusers.QwenImagePipeline(vae=vae.eval(), transformer=transformer.eval(), scheduler=scheduler, **NO_TEXT)

    def encode(prompt: str | None, **_: Any) -> tuple[Tensor, ...]:
        return text(prompt), mask().bool()

    return ready(pipe, encode), {"height": 64, "width": 64, "num_inference_steps": 2}


def nothing(*_: Any, **__: Any) -> None:
    """In place of what tiny models on a CPU have no use for."""


def fitted(pipe: Any, call: dict[str, Any]) -> Any:
    """A pipeline that takes the sizes and steps of `call`, whatever else it is called with."""
    cls = type(pipe)

    @functools.wraps(cls.__call__)
    def small(self: Any, *args: Any, **given: Any) -> Any:
        return cls.__call__(self, *args, **given | call)

    instead = {"__call__": small, "enable_model_cpu_offload": nothing, "enable_group_offload": nothing}
    pipe.__class__ = type(cls.__name__, (cls,), instead)
    pipe.transformer.compile_repeated_blocks = nothing
    return pipe


def stand_in(make: Callable[[], Made]) -> type:
    """A class in place of a pipeline's, whose `from_pretrained` gives the tiny one."""

    class Tiny:
        @staticmethod
        def from_pretrained(*_: Any, **__: Any) -> Any:
            # Threads that wait for each other make tiny models a hundred times slower on busy cores.
            torch.set_num_threads(1)
            return fitted(*make())

    return Tiny


class AutoencoderKLWan:
    """In place of the autoencoder that the script of Wan loads by itself; the tiny pipeline has its own."""

    from_pretrained = staticmethod(nothing)


LTXPipeline = stand_in(ltx)
LTX2Pipeline = stand_in(ltx2)
WanPipeline = stand_in(wan22)
HunyuanVideo15Pipeline = stand_in(hunyuan15)
CogVideoXPipeline = stand_in(cogvideox)
FluxPipeline = stand_in(flux)
StableDiffusion3Pipeline = stand_in(sd35)
QwenImagePipeline = stand_in(qwen_image)
