"""The five video models of the cost benchmark: stock pipelines around transformers with random weights.

Depth, head dimension and the proportions inside a block are those of the released models. Width and number of
tokens are as large as the machine allows: on the CPU 384 wide, on a GPU (LTX and Wan only) the released size.
No text encoder and no VAE: embeddings are random, and the result is latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import diffusers
import torch
from torch import Tensor

Cfg = Literal["batched", "two_calls", "single"]


@dataclass(frozen=True)
class Size:
    """How large a model and its input are.

    Attributes:
        heads: attention heads.
        head_dim: their width, as released.
        frames: latent frames.
        side: height and width, in patches.
        text: text tokens.
        text_width: width of the text embeddings.
    """

    heads: int
    head_dim: int
    frames: int
    side: tuple[int, int]
    text: int
    text_width: int

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def tokens(self) -> int:
        return self.frames * self.side[0] * self.side[1]


@dataclass(frozen=True)
class Case:
    """One pipeline in one way of guiding.

    Attributes:
        cfg: "batched": one call per step with rows [uncond, cond]; "two_calls": cond, then uncond; "single": cond only.
        make: the transformer and the rest of the pipeline.
        arguments: of the pipeline's call.
        sizes: "cpu", "quick" and, for some, "cuda".
        uncond: what differs in the unconditional call: transformer argument -> pipeline argument.
    """

    name: str
    title: str
    cfg: Cfg
    make: Callable[[Size], Any]
    arguments: Callable[[Size], dict[str, Any]]
    sizes: dict[str, Size]
    uncond: dict[str, str]

    @property
    def branches(self) -> int:
        return 1 if self.cfg == "single" else 2

    def build(self, size: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
        """The pipeline, without a progress bar."""
        torch.manual_seed(0)
        with torch.device(device):
            pipe = self.make(self.sizes[size])
        if dtype is not torch.float32:
            pipe.transformer.to(dtype)
        pipe.transformer.eval().requires_grad_(False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(self, size: str, steps: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Keyword arguments of the pipeline's call; the latents come from a generator that is made anew by `run`."""
        arguments = self.arguments(self.sizes[size])
        moved = {
            k: v.to(device, dtype if v.is_floating_point() else v.dtype) if isinstance(v, Tensor) else v
            for k, v in arguments.items()
        }
        return {**moved, "num_inference_steps": steps, "output_type": "latent", "return_dict": False}


def run(pipe: Any, call: dict[str, Any]) -> Tensor:
    """Latents of one call, always from the same noise."""
    latents: Tensor = pipe(**call, generator=torch.Generator().manual_seed(1))[0]
    return latents


def _text(size: Size, *, negative: bool = True, mask: bool = False, pooled: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    out: dict[str, Tensor] = {}
    for prefix in ("", "negative_")[: 1 + negative]:
        out[f"{prefix}prompt_embeds"] = torch.randn(1, size.text, size.text_width, generator=generator)
        if mask:
            out[f"{prefix}prompt_attention_mask"] = torch.ones(1, size.text, dtype=torch.long)
        if pooled:
            out[f"{prefix}pooled_prompt_embeds"] = torch.randn(1, pooled, generator=generator)
    return out


def _pixels(size: Size, patch: int, stride: int) -> dict[str, int]:
    height, width = (patch * n for n in size.side)
    return {"height": height, "width": width, "num_frames": stride * (size.frames - 1) + 1}


def _pipe(cls: type, transformer: Any, scheduler: Any, *absent: str) -> Any:
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", *absent))
    return cls(**nothing, transformer=transformer, scheduler=scheduler)


def _ltx(size: Size) -> Any:
    model = diffusers.LTXVideoTransformer3DModel(
        num_layers=28,
        num_attention_heads=size.heads,
        attention_head_dim=size.head_dim,
        cross_attention_dim=size.width,
        caption_channels=size.text_width,
    )
    return _pipe(diffusers.LTXPipeline, model, diffusers.FlowMatchEulerDiscreteScheduler())


def _wan(size: Size) -> Any:
    model = diffusers.WanTransformer3DModel(
        num_layers=30,
        num_attention_heads=size.heads,
        attention_head_dim=size.head_dim,
        ffn_dim=size.width * 8960 // 1536,
        text_dim=size.text_width,
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return _pipe(diffusers.WanPipeline, model, scheduler)


def _cogvideox(size: Size) -> Any:
    model = diffusers.CogVideoXTransformer3DModel(
        num_layers=30,
        num_attention_heads=size.heads,
        attention_head_dim=size.head_dim,
        text_embed_dim=size.text_width,
        max_text_seq_length=size.text,
        sample_height=2 * size.side[0],
        sample_width=2 * size.side[1],
        sample_frames=4 * (size.frames - 1) + 1,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    return _pipe(diffusers.CogVideoXPipeline, model, scheduler)


def _mochi(size: Size) -> Any:
    model = diffusers.MochiTransformer3DModel(
        num_layers=48,
        num_attention_heads=size.heads,
        attention_head_dim=size.head_dim,
        pooled_projection_dim=size.width // 2,
        text_embed_dim=size.text_width,
        max_sequence_length=size.text,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return _pipe(diffusers.MochiPipeline, model, scheduler)


_POOLED = 96


def _hunyuan(size: Size) -> Any:
    model = diffusers.HunyuanVideoTransformer3DModel(
        num_layers=20,
        num_single_layers=40,
        num_attention_heads=size.heads,
        attention_head_dim=size.head_dim,
        text_embed_dim=size.text_width,
        pooled_projection_dim=_POOLED,
        rope_axes_dim=(size.head_dim // 8, 7 * size.head_dim // 16, 7 * size.head_dim // 16),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    return _pipe(diffusers.HunyuanVideoPipeline, model, scheduler, "text_encoder_2", "tokenizer_2")


_HUNYUAN_SIZES = {"cpu": Size(3, 128, 2, (6, 8), 24, 512), "quick": Size(2, 32, 2, (2, 2), 4, 32)}
_EMBEDS = {"encoder_hidden_states": "negative_prompt_embeds"}
_MASK = {"encoder_attention_mask": "negative_prompt_attention_mask"}

CASES = (
    Case(
        "ltx",
        "LTX-Video",
        "batched",
        _ltx,
        lambda size: {**_text(size, mask=True), **_pixels(size, 32, 8), "guidance_scale": 3.0},
        {
            "cpu": Size(6, 64, 2, (8, 8), 32, 512),
            "quick": Size(2, 16, 2, (2, 2), 4, 32),
            "cuda": Size(32, 64, 13, (16, 24), 128, 4096),
        },
        {**_EMBEDS, **_MASK},
    ),
    Case(
        "wan",
        "Wan 2.1",
        "two_calls",
        _wan,
        lambda size: {**_text(size), **_pixels(size, 16, 4), "guidance_scale": 5.0},
        {
            "cpu": Size(3, 128, 2, (8, 8), 32, 512),
            "quick": Size(2, 16, 2, (2, 2), 4, 32),
            "cuda": Size(12, 128, 9, (30, 52), 512, 4096),
        },
        _EMBEDS,
    ),
    Case(
        "cogvideox",
        "CogVideoX-2B",
        "batched",
        _cogvideox,
        lambda size: {**_text(size), **_pixels(size, 16, 4), "guidance_scale": 6.0},
        {"cpu": Size(6, 64, 2, (8, 8), 32, 512), "quick": Size(2, 16, 2, (2, 2), 4, 32)},
        _EMBEDS,
    ),
    Case(
        "mochi",
        "Mochi",
        "batched",
        _mochi,
        lambda size: {**_text(size, mask=True), **_pixels(size, 16, 6), "guidance_scale": 4.5},
        {"cpu": Size(3, 128, 2, (6, 8), 24, 512), "quick": Size(2, 16, 2, (2, 2), 4, 32)},
        {**_EMBEDS, **_MASK},
    ),
    Case(
        "hunyuan",
        "HunyuanVideo, true CFG",
        "two_calls",
        _hunyuan,
        lambda size: {
            **_text(size, mask=True, pooled=_POOLED),
            **_pixels(size, 16, 4),
            "guidance_scale": 6.0,
            "true_cfg_scale": 4.0,
        },
        _HUNYUAN_SIZES,
        {**_EMBEDS, **_MASK, "pooled_projections": "negative_pooled_prompt_embeds"},
    ),
    Case(
        "hunyuan_distilled",
        "HunyuanVideo, distilled (no CFG)",
        "single",
        _hunyuan,
        lambda size: {
            **_text(size, negative=False, mask=True, pooled=_POOLED),
            **_pixels(size, 16, 4),
            "guidance_scale": 6.0,
        },
        _HUNYUAN_SIZES,
        {},
    ),
)

BY_NAME = {case.name: case for case in CASES}
