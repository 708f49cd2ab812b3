"""Random inputs for the video transformers, from a model's config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TEXT = 6


def noise(*shape: int) -> Tensor:
    """The same random tensor for the same shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def time(value: float = 700.0) -> Tensor:
    """One row's timestep."""
    return torch.tensor([value])


def _mask(length: int = TEXT) -> Tensor:
    return torch.ones(1, length, dtype=torch.long)


def _patches(c: Any, channels: int, frames: int = 2, side: int = 3) -> Tensor:
    """A video `[1, C, F, H, W]` of so many patches."""
    size: Any = c.patch_size
    t, h, w = size if isinstance(size, (tuple, list)) else (getattr(c, "patch_size_t", None) or 1, size, size)
    return noise(1, channels, frames * t, side * h, side * w)


def _ltx(c: Any) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, 2 * 3 * 3, c.in_channels),
        "encoder_hidden_states": noise(1, TEXT, c.caption_channels),
        "timestep": time(),
        "encoder_attention_mask": torch.ones(1, TEXT),
        "num_frames": 2,
        "height": 3,
        "width": 3,
    }


def _ltx2(c: Any) -> dict[str, Any]:
    text = (c.caption_channels, c.caption_channels)
    if not c.use_prompt_embeddings:
        text = (c.cross_attention_dim, c.audio_cross_attention_dim)
    return {
        "hidden_states": noise(1, 2 * 3 * 3, c.in_channels),
        "audio_hidden_states": noise(1, 5, c.audio_in_channels),
        "encoder_hidden_states": noise(1, TEXT, text[0]),
        "audio_encoder_hidden_states": noise(1, TEXT, text[1]),
        "timestep": time(),
        "sigma": time(0.7),
        "num_frames": 2,
        "height": 3,
        "width": 3,
        "audio_num_frames": 5,
    }


def _wan(c: Any) -> dict[str, Any]:
    image = getattr(c, "image_dim", None) is not None
    inputs = {
        "hidden_states": _patches(c, c.in_channels),
        "timestep": time(),
        # with image tokens, Wan counts everything before the last 512 tokens as image
        "encoder_hidden_states": noise(1, 512 if image else TEXT, c.text_dim),
    }
    return inputs | ({"encoder_hidden_states_image": noise(1, 5, c.image_dim)} if image else {})


def _vace(c: Any) -> dict[str, Any]:
    return _wan(c) | {"control_hidden_states": _patches(c, c.vace_in_channels)}


def _animate(c: Any) -> dict[str, Any]:
    latent, size = c.latent_channels, c.motion_encoder_size
    return _wan(c) | {
        "hidden_states": _patches(c, 2 * latent + 4, frames=3),
        "pose_hidden_states": _patches(c, latent, frames=2),
        "face_pixel_values": noise(1, 3, 5, size, size),
    }


def _skyreels(c: Any) -> dict[str, Any]:
    given = {"hidden_states": _patches(c, c.in_channels, frames=2 * c.num_frame_per_block)}
    return _wan(c) | given | ({"fps": torch.tensor([1])} if c.inject_sample_info else {})


def _anyflow(c: Any) -> dict[str, Any]:
    times = time().expand(1, 2)
    video = _patches(c, c.in_channels).transpose(1, 2)
    return _wan(c) | {"hidden_states": video, "timestep": times, "r_timestep": times - 100}


def _cogvideox(c: Any) -> dict[str, Any]:
    time_patch = getattr(c, "patch_size_t", None) or 1
    size = (c.sample_height // 2 * 2, c.sample_width // 2 * 2) if not c.use_rotary_positional_embeddings else (6, 6)
    frames = (
        2 * time_patch
        if c.use_rotary_positional_embeddings
        else (c.sample_frames - 1) // c.temporal_compression_ratio + 1
    )
    tokens = frames // time_patch * (size[0] // c.patch_size) * (size[1] // c.patch_size)
    angles = noise(tokens, c.attention_head_dim // 2).repeat_interleave(2, dim=1)
    text = TEXT if c.use_rotary_positional_embeddings else c.max_text_seq_length
    inputs = {
        "hidden_states": noise(1, frames, c.in_channels, *size),
        "encoder_hidden_states": noise(1, text, c.text_embed_dim),
        "timestep": time(),
    }
    return inputs | ({"image_rotary_emb": (angles.cos(), angles.sin())} if c.use_rotary_positional_embeddings else {})


def _consisid(c: Any) -> dict[str, Any]:
    faces = {"id_cond": noise(1, c.LFE_id_dim), "id_vit_hidden": [noise(1, 3, c.LFE_vit_dim)] * c.LFE_num_scale}
    return _cogvideox(c) | (faces if c.is_train_face else {})


def _mochi(c: Any) -> dict[str, Any]:
    return {
        "hidden_states": _patches(c, c.in_channels),
        "encoder_hidden_states": noise(1, c.max_sequence_length, c.text_embed_dim),
        "timestep": time(),
        "encoder_attention_mask": _mask(c.max_sequence_length),
    }


def _hunyuan(c: Any) -> dict[str, Any]:
    inputs = {
        "hidden_states": _patches(c, c.in_channels),
        "timestep": time(),
        "encoder_hidden_states": noise(1, TEXT, c.text_embed_dim),
        "encoder_attention_mask": _mask(),
        "pooled_projections": noise(1, c.pooled_projection_dim),
    }
    return inputs | ({"guidance": time(6000.0)} if c.guidance_embeds else {})


def _framepack(c: Any) -> dict[str, Any]:
    side = 4 * c.patch_size // 2
    past = {"clean": (1, 6, 7), "history_2x": (2, 4, 6), "history_4x": (4, 0, 4)}
    history = {f"latents_{name}": noise(1, c.in_channels, n, side, side) for name, (n, _, _) in past.items()}
    indices = {f"indices_latents_{name}": torch.arange(a, b) for name, (_, a, b) in past.items()}
    return (
        _hunyuan(c)
        | {"hidden_states": noise(1, c.in_channels, 2 * c.patch_size_t, side, side)}
        | {"image_embeds": noise(1, 3, c.image_proj_dim), "indices_latents": torch.arange(7, 9)}
        | history
        | indices
    )


def _hunyuan15(c: Any) -> dict[str, Any]:
    return {
        "hidden_states": _patches(c, c.in_channels),
        "timestep": time(),
        "encoder_hidden_states": noise(1, TEXT, c.text_embed_dim),
        "encoder_attention_mask": _mask(),
        "encoder_hidden_states_2": noise(1, 4, c.text_embed_2_dim),
        "encoder_attention_mask_2": _mask(4),
        "image_embeds": torch.zeros(1, 3, c.image_embed_dim),
    }


def _motif(c: Any) -> dict[str, Any]:
    return {
        "hidden_states": _patches(c, c.in_channels),
        "timestep": time(),
        "encoder_hidden_states": noise(1, TEXT, c.text_embed_dim),
        "encoder_attention_mask": _mask(),
    }


def _latte(c: Any) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, c.in_channels, c.video_length, c.sample_size, c.sample_size),
        "timestep": time(),
        "encoder_hidden_states": noise(1, TEXT, c.caption_channels),
    }


def _captioned(c: Any) -> dict[str, Any]:
    """Allegro and Sana-Video."""
    inputs = {
        "hidden_states": _patches(c, c.in_channels),
        "encoder_hidden_states": noise(1, TEXT, c.caption_channels),
        "timestep": time(),
        "encoder_attention_mask": _mask(),
    }
    return inputs | ({"guidance": time(4.0)} if getattr(c, "guidance_embeds", False) else {})


def _cosmos(c: Any) -> dict[str, Any]:
    text = noise(1, TEXT, c.crossattn_proj_in_channels if c.use_crossattn_projection else c.text_embed_dim)
    image = noise(1, c.img_context_num_tokens, c.img_context_dim_in) if c.img_context_dim_in else None
    video = _patches(c, c.in_channels)
    return {
        "hidden_states": video,
        "timestep": time(),
        "encoder_hidden_states": text if image is None else (text, image),
        "fps": 24,
        "padding_mask": torch.zeros(1, 1, *video.shape[-2:]),
    }


def _easyanimate(c: Any) -> dict[str, Any]:
    return {
        "hidden_states": _patches(c, c.in_channels),
        "timestep": time(),
        "encoder_hidden_states": noise(1, TEXT, c.text_embed_dim),
    }


def _kandinsky(c: Any) -> dict[str, Any]:
    t, h, w = c.patch_size
    channels = 2 * c.in_visual_dim + 1 if c.visual_cond else c.in_visual_dim
    return {
        "hidden_states": noise(1, 2 * t, 3 * h, 3 * w, channels),
        "encoder_hidden_states": noise(1, TEXT, c.in_text_dim),
        "timestep": time(),
        "pooled_projections": noise(1, c.in_text_dim2),
        "visual_rope_pos": (torch.arange(2), torch.arange(3), torch.arange(3)),
    }


def _kandinsky5(c: Any) -> dict[str, Any]:
    return _kandinsky(c) | {"text_rope_pos": torch.arange(TEXT)}


def _kandinsky6(c: Any) -> dict[str, Any]:
    return _kandinsky(c) | {"audio_hidden_states": noise(1, 4, c.in_audio_dim)}


def _minimax_h3(c: Any) -> dict[str, Any]:
    counts = (TEXT, 8, 3)  # text, video, audio
    tags = torch.cat([torch.full((n,), tag) for tag, n in enumerate(counts)])
    place = torch.arange(len(tags))
    t, h, w = c.patch_size
    return {
        "hidden_states": noise(1, counts[1], c.in_channels * t * h * w),
        "audio_hidden_states": noise(1, counts[2], c.audio_in_channels),
        "encoder_hidden_states": noise(1, TEXT, c.text_dim),
        "timestep": torch.tensor([0.0, 700.0]),
        "timestep_indices": (tags > 0).long(),
        "token_tags": tags,
        "position_ids": torch.stack([place, place % 2, place % 3], dim=1),
        "text_indices": place[tags == 0],
        "video_indices": place[tags == 1],
        "audio_indices": place[tags == 2],
    }


VIDEO_SAMPLES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "LTXVideoTransformer3DModel": _ltx,
    "LTX2VideoTransformer3DModel": _ltx2,
    "WanTransformer3DModel": _wan,
    "WanVACETransformer3DModel": _vace,
    "WanAnimateTransformer3DModel": _animate,
    "SkyReelsV2Transformer3DModel": _skyreels,
    "ChronoEditTransformer3DModel": _wan,
    "AnyFlowTransformer3DModel": _anyflow,
    "HeliosTransformer3DModel": _wan,
    "CogVideoXTransformer3DModel": _cogvideox,
    "ConsisIDTransformer3DModel": _consisid,
    "MochiTransformer3DModel": _mochi,
    "HunyuanVideoTransformer3DModel": _hunyuan,
    "HunyuanVideoFramepackTransformer3DModel": _framepack,
    "HunyuanVideo15Transformer3DModel": _hunyuan15,
    "MotifVideoTransformer3DModel": _motif,
    "LatteTransformer3DModel": _latte,
    "AllegroTransformer3DModel": _captioned,
    "SanaVideoTransformer3DModel": _captioned,
    "CosmosTransformer3DModel": _cosmos,
    "EasyAnimateTransformer3DModel": _easyanimate,
    "Kandinsky5Transformer3DModel": _kandinsky5,
    "Kandinsky6Transformer3DModel": _kandinsky6,
    "MiniMaxH3Transformer3DModel": _minimax_h3,
}
