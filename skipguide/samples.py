"""Random inputs for the families that ship, from a model's config: what `check(model)` runs on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from skipguide.errors import SkipError
from skipguide.families_llm import layout_of

TEXT = 6


def sample_inputs(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments of one small forward call, for a model of a known family.

    Raises:
        SkipError: for other models; the caller gives inputs then.
    """
    if layout_of(model) is not None:
        return _tokens(model)
    for cls in type(model).__mro__:
        if cls.__name__ in _SAMPLES:
            parameter = next(p for p in model.parameters() if p.is_floating_point())
            inputs = _SAMPLES[cls.__name__](model.config)
            return {k: _place(v, parameter) for k, v in inputs.items()}
    raise SkipError(
        f"no sample inputs for {type(model).__name__}: pass the keyword arguments of one forward call, "
        f"check(model, inputs)"
    )


def _tokens(model: nn.Module) -> dict[str, Any]:
    config: Any = model.config
    size = getattr(config, "vocab_size", None) or config.get_text_config().vocab_size
    ids = torch.randint(size, (1, TEXT), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.to(next(model.parameters()).device), "use_cache": False}


def _place(value: Any, like: Tensor) -> Any:
    if isinstance(value, tuple):
        return tuple(_place(item, like) for item in value)
    if isinstance(value, Tensor):
        return value.to(like.device, like.dtype if value.is_floating_point() else None)
    return value


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _time(value: float = 700.0) -> Tensor:
    return torch.tensor([value])


def _ltx(c: Any) -> dict[str, Any]:
    return {
        "hidden_states": _noise(1, 2 * 3 * 3, c.in_channels),
        "encoder_hidden_states": _noise(1, TEXT, c.caption_channels),
        "timestep": _time(),
        "encoder_attention_mask": torch.ones(1, TEXT),
        "num_frames": 2,
        "height": 3,
        "width": 3,
    }


def _wan(c: Any) -> dict[str, Any]:
    frames, height, width = c.patch_size
    image = c.image_dim is not None
    inputs = {
        "hidden_states": _noise(1, c.in_channels, 2 * frames, 3 * height, 3 * width),
        "timestep": _time(),
        # with image tokens, Wan counts everything before the last 512 tokens as image
        "encoder_hidden_states": _noise(1, 512 if image else TEXT, c.text_dim),
    }
    return inputs | ({"encoder_hidden_states_image": _noise(1, 5, c.image_dim)} if image else {})


def _cogvideox(c: Any) -> dict[str, Any]:
    time_patch = c.patch_size_t or 1
    size = (c.sample_height // 2 * 2, c.sample_width // 2 * 2) if not c.use_rotary_positional_embeddings else (6, 6)
    frames = (
        2 * time_patch
        if c.use_rotary_positional_embeddings
        else (c.sample_frames - 1) // c.temporal_compression_ratio + 1
    )
    tokens = frames // time_patch * (size[0] // c.patch_size) * (size[1] // c.patch_size)
    angles = _noise(tokens, c.attention_head_dim // 2).repeat_interleave(2, dim=1)
    text = TEXT if c.use_rotary_positional_embeddings else c.max_text_seq_length
    inputs = {
        "hidden_states": _noise(1, frames, c.in_channels, *size),
        "encoder_hidden_states": _noise(1, text, c.text_embed_dim),
        "timestep": _time(),
    }
    return inputs | ({"image_rotary_emb": (angles.cos(), angles.sin())} if c.use_rotary_positional_embeddings else {})


def _mochi(c: Any) -> dict[str, Any]:
    return {
        "hidden_states": _noise(1, c.in_channels, 2, 3 * c.patch_size, 3 * c.patch_size),
        "encoder_hidden_states": _noise(1, c.max_sequence_length, c.text_embed_dim),
        "timestep": _time(),
        "encoder_attention_mask": torch.ones(1, c.max_sequence_length, dtype=torch.long),
    }


def _hunyuan(c: Any) -> dict[str, Any]:
    inputs = {
        "hidden_states": _noise(1, c.in_channels, 2 * c.patch_size_t, 3 * c.patch_size, 3 * c.patch_size),
        "timestep": _time(),
        "encoder_hidden_states": _noise(1, TEXT, c.text_embed_dim),
        "encoder_attention_mask": torch.ones(1, TEXT, dtype=torch.long),
        "pooled_projections": _noise(1, c.pooled_projection_dim),
    }
    return inputs | ({"guidance": _time(6000.0)} if c.guidance_embeds else {})


def _hunyuan15(c: Any) -> dict[str, Any]:
    return {
        "hidden_states": _noise(1, c.in_channels, 2 * c.patch_size_t, 3 * c.patch_size, 3 * c.patch_size),
        "timestep": _time(),
        "encoder_hidden_states": _noise(1, TEXT, c.text_embed_dim),
        "encoder_attention_mask": torch.ones(1, TEXT, dtype=torch.long),
        "encoder_hidden_states_2": _noise(1, 4, c.text_embed_2_dim),
        "encoder_attention_mask_2": torch.ones(1, 4, dtype=torch.long),
        "image_embeds": torch.zeros(1, 3, c.image_embed_dim),
    }


def _latte(c: Any) -> dict[str, Any]:
    return {
        "hidden_states": _noise(1, c.in_channels, c.video_length, c.sample_size, c.sample_size),
        "timestep": _time(),
        "encoder_hidden_states": _noise(1, TEXT, c.caption_channels),
    }


def _sd3(c: Any) -> dict[str, Any]:
    return {
        "hidden_states": _noise(1, c.in_channels, 4 * c.patch_size, 4 * c.patch_size),
        "encoder_hidden_states": _noise(1, TEXT, c.joint_attention_dim),
        "pooled_projections": _noise(1, c.pooled_projection_dim),
        "timestep": _time(),
    }


def _flux(c: Any) -> dict[str, Any]:
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    inputs = {
        "hidden_states": _noise(1, 16, c.in_channels),
        "encoder_hidden_states": _noise(1, TEXT, c.joint_attention_dim),
        "pooled_projections": _noise(1, c.pooled_projection_dim),
        "timestep": _time(0.7),
        "img_ids": torch.stack([torch.zeros(16), rows.flatten(), columns.flatten()], dim=1),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    return inputs | ({"guidance": _time(3.5)} if c.guidance_embeds else {})


_SAMPLES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "LTXVideoTransformer3DModel": _ltx,
    "WanTransformer3DModel": _wan,
    "CogVideoXTransformer3DModel": _cogvideox,
    "MochiTransformer3DModel": _mochi,
    "HunyuanVideoTransformer3DModel": _hunyuan,
    "HunyuanVideo15Transformer3DModel": _hunyuan15,
    "LatteTransformer3DModel": _latte,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
}
