"""The pipelines of the `native` benchmark: those whose own guidance makes further passes, with random weights.

Depth, head dimension and the proportions inside a block are those of the released models, width and number of tokens
are what a CPU core can do. No text encoder and no VAE: embeddings are random, and the result is latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from demos.benchmarks.stg_models import Size
from demos.gpu.models import MODELS

STEPS = 2
SIZES = {"cpu": Size(6, 64, 2, (8, 8), 32, 512), "quick": Size(2, 16, 2, (2, 2), 4, 32)}


@dataclass(frozen=True)
class Native:
    """One pipeline with its own guidance.

    Attributes:
        name: for the command line.
        title: for the table.
        guidance: what it makes further passes for, in words.
        build: size -> the pipeline.
        call: pipeline, size -> its latents after some steps.
    """

    name: str
    title: str
    guidance: str
    build: Callable[[Size], Any]
    call: Callable[[Any, Size], Tensor]


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.eval().requires_grad_(False)
    return pipe


# -- LTX-2: conditional, unconditional, STG at block 28, modality isolation -------------------------------------------

_SCALES = {"guidance_scale": 3.0, "stg_scale": 1.0, "modality_scale": 3.0, "guidance_rescale": 0.7}
_LAYER = 28


def _joined(outputs: Any) -> Tensor:
    return torch.cat([each.flatten(1) for each in outputs], dim=1)


def _ltx2(size: Size) -> Any:
    return _quiet(MODELS["ltx2"].case.make(size))


def _ltx2_call(pipe: Any, size: Size) -> Tensor:
    scales = _SCALES | {f"audio_{name}": value for name, value in _SCALES.items()}
    call = MODELS["ltx2"].case.arguments(size) | scales | {"num_inference_steps": STEPS, "output_type": "latent"}
    generator = torch.Generator().manual_seed(3)
    blocks = {"spatio_temporal_guidance_blocks": [_LAYER]}
    return _joined(pipe(**call, **blocks, generator=generator, return_dict=False))


def _modular_ltx2(size: Size) -> Any:
    from diffusers.modular_pipelines.ltx2.modular_blocks_ltx2 import LTX2CoreDenoiseStep

    classic = _ltx2(size)
    pipe = LTX2CoreDenoiseStep().init_pipeline()
    video = diffusers.LTX2Guidance(**_SCALES, spatio_temporal_guidance_blocks=[_LAYER])
    parts = {name: getattr(classic, name) for name in ("transformer", "scheduler", "audio_vae")}
    pipe.update_components(**parts, guider=video, audio_guider=diffusers.LTX2Guidance(**_SCALES))
    return _quiet(pipe)


def _modular_ltx2_call(pipe: Any, size: Size) -> Tensor:
    text: dict[str, Any] = {}
    for seed, prefix in ((1, ""), (2, "negative_")):
        made = _noise(seed, 1, size.text, size.text_width)
        text |= {f"{prefix}connector_{name}prompt_embeds": made for name in ("", "audio_")}
        text[f"{prefix}connector_attention_mask"] = torch.ones(1, size.text, dtype=torch.long)
    height, width = (32 * patches for patches in size.side)
    sides = {"height": height, "width": width, "num_frames": 8 * (size.frames - 1) + 1, "frame_rate": 24.0}
    call = {"batch_size": 1, "dtype": torch.float32, "num_inference_steps": STEPS}
    generator = torch.Generator().manual_seed(3)
    out = pipe(**text, **sides, **call, generator=generator, output=["latents", "audio_latents"])
    return _joined(out.values())


# -- images -----------------------------------------------------------------------------------------------------------


def _text(size: Size, pooled: int = 0, mask: bool = False) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for seed, prefix in ((1, ""), (2, "negative_")):
        made[f"{prefix}prompt_embeds"] = _noise(seed, 1, size.text, size.text_width)
        if pooled:
            made[f"{prefix}pooled_prompt_embeds"] = _noise(seed + 4, 1, pooled)
        if mask:
            made[f"{prefix}prompt_attention_mask"] = torch.ones(1, size.text, dtype=torch.long)
    return made


def _image(pipe: Any, call: dict[str, Any]) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    form = {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False}
    found: Tensor = pipe(**call, **form, generator=generator)[0]
    return found


_POOLED = 64


def _sd35(size: Size) -> Any:
    """Stable Diffusion 3.5 medium: 24 blocks, the first 13 with a second attention of the image."""
    return diffusers.SD3Transformer2DModel(
        sample_size=2 * size.side[0],
        num_layers=24,
        num_attention_heads=size.heads,
        attention_head_dim=size.head_dim,
        joint_attention_dim=size.text_width,
        caption_projection_dim=size.width,
        pooled_projection_dim=_POOLED,
        pos_embed_max_size=2 * size.side[0],
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )


def _around_sd35(cls: Any, size: Size, **config: Any) -> Any:
    texts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return _quiet(cls(**dict.fromkeys(texts), vae=None, transformer=_sd35(size), scheduler=scheduler, **config))


def _sd35_call(pipe: Any, size: Size, **own: Any) -> Tensor:
    sides = dict(zip(("height", "width"), (16 * patches for patches in size.side), strict=True))
    return _image(pipe, {**_text(size, _POOLED), **sides, "guidance_scale": 4.5, **own})


def _sana(size: Size) -> Any:
    """Sana 1.6B: 20 blocks with linear attention."""
    model = diffusers.SanaTransformer2DModel(
        num_layers=20,
        num_attention_heads=size.width // 32,
        attention_head_dim=32,
        num_cross_attention_heads=size.heads,
        cross_attention_head_dim=size.head_dim,
        cross_attention_dim=size.width,
        caption_channels=size.text_width,
        sample_size=size.side[0],
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    nothing = dict.fromkeys(("tokenizer", "text_encoder", "vae"))
    pipe = diffusers.SanaPAGPipeline(**nothing, transformer=model, scheduler=scheduler)
    pipe.set_pag_applied_layers("transformer_blocks.8", pipe._pag_attn_processors)
    return _quiet(pipe)


def _sana_call(pipe: Any, size: Size) -> Tensor:
    sides = dict(zip(("height", "width"), (16 * patches for patches in size.side), strict=True))  # 32 at least
    own = {"guidance_scale": 5.0, "pag_scale": 2.0, "use_resolution_binning": False, "negative_prompt": None}
    return _image(pipe, {**_text(size, mask=True), **sides, **own})


WINDOW = {"skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 1.0}  # every step, as inside its window

NATIVE = {
    case.name: case
    for case in (
        Native("ltx2", "LTX-2", "STG at block 28 of 48, and modality isolation", _ltx2, _ltx2_call),
        Native(
            "sd35",
            "Stable Diffusion 3.5 medium",
            "`skip_guidance_layers=[7, 8, 9]` of 24, in its window",
            lambda size: _around_sd35(diffusers.StableDiffusion3Pipeline, size),
            lambda pipe, size: _sd35_call(pipe, size, skip_guidance_layers=[7, 8, 9], **WINDOW),
        ),
        Native(
            "sd35_pag",
            "Stable Diffusion 3.5 medium, PAG",
            "perturbed attention in block 13 of 24",
            lambda size: _around_sd35(
                diffusers.StableDiffusion3PAGPipeline, size, pag_applied_layers="transformer_blocks.13"
            ),
            lambda pipe, size: _sd35_call(pipe, size, pag_scale=0.7),
        ),
        Native("sana_pag", "Sana 1.6B, PAG", "perturbed attention in block 8 of 20", _sana, _sana_call),
        Native(
            "modular_ltx2",
            "LTX-2, modular",
            "`LTX2Guidance`: STG at block 28 of 48, and modality isolation",
            _modular_ltx2,
            _modular_ltx2_call,
        ),
    )
}
