"""Random inputs for the image families, from a model's config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from skipguide.families.samples.video import TEXT, noise, time

Sample = Callable[[Any], dict[str, Any]]
SIDE = 4  # tokens


def _mask(length: int = TEXT) -> Tensor:
    return torch.ones(1, length, dtype=torch.bool)


def _places(axes: int = 3) -> Tensor:
    """Frame, row and column of each image token."""
    rows, columns = torch.meshgrid(torch.arange(float(SIDE)), torch.arange(float(SIDE)), indexing="ij")
    places = torch.stack([torch.zeros(SIDE * SIDE), rows.flatten(), columns.flatten()], dim=1)
    return torch.nn.functional.pad(places, (0, axes - 3))


def _plane(c: Any, text: int | None, t: float = 700.0) -> dict[str, Any]:
    """Latents with channels first, with the text's channels."""
    side = SIDE * (c.patch_size if isinstance(c.patch_size, int) else c.patch_size[0])
    inputs = {"hidden_states": noise(1, c.in_channels, side, side), "timestep": time(t)}
    return inputs | ({"encoder_hidden_states": noise(1, TEXT, text)} if text else {})


def _packed(c: Any, text: int | None = None, t: float = 0.7) -> dict[str, Any]:
    """Latents as tokens."""
    return {
        "hidden_states": noise(1, SIDE * SIDE, c.in_channels),
        "encoder_hidden_states": noise(1, TEXT, text or c.joint_attention_dim),
        "timestep": time(t),
    }


def _flux_kin(c: Any) -> dict[str, Any]:
    return _packed(c) | {"img_ids": _places(), "txt_ids": torch.zeros(TEXT, 3)}


def _sd3(c: Any) -> dict[str, Any]:
    return _plane(c, c.joint_attention_dim) | {"pooled_projections": noise(1, c.pooled_projection_dim)}


def _flux(c: Any) -> dict[str, Any]:
    inputs = _flux_kin(c) | {"pooled_projections": noise(1, c.pooled_projection_dim)}
    return inputs | ({"guidance": time(3.5)} if c.guidance_embeds else {})


def _flux2(c: Any) -> dict[str, Any]:
    axes = len(c.axes_dims_rope)
    inputs = _packed(c) | {"img_ids": _places(axes), "txt_ids": torch.zeros(TEXT, axes)}
    return inputs | ({"guidance": time(3.5)} if c.guidance_embeds else {})


def _bria(c: Any) -> dict[str, Any]:
    return _flux_kin(c) | {"timestep": time()}


def _bria_fibo(c: Any) -> dict[str, Any]:
    layers = c.num_layers + c.num_single_layers
    return _bria(c) | {"text_encoder_layers": [noise(1, TEXT, c.text_encoder_dim) for _ in range(layers)]}


def _qwen(c: Any) -> dict[str, Any]:
    return _packed(c) | {"img_shapes": [[(1, SIDE, SIDE)]], "encoder_hidden_states_mask": _mask()}


def _hunyuan_image(c: Any) -> dict[str, Any]:
    sides = [SIDE * patch for patch in c.patch_size]
    inputs = _plane(c, c.text_embed_dim) | {
        "hidden_states": noise(1, c.in_channels, *sides),
        "encoder_attention_mask": _mask(),
    }
    if c.text_embed_2_dim is not None:
        inputs |= {"encoder_hidden_states_2": noise(1, 4, c.text_embed_2_dim), "encoder_attention_mask_2": _mask(4)}
    if c.use_meanflow:
        inputs |= {"timestep_r": time(500.0)}
    return inputs | ({"guidance": time(3500.0)} if c.guidance_embeds else {})


def _auraflow(c: Any) -> dict[str, Any]:
    return _plane(c, c.joint_attention_dim, 0.7)


def _hidream(c: Any) -> dict[str, Any]:
    text, llama = c.caption_channels
    inputs = _plane(c, None)
    return {
        "hidden_states": inputs["hidden_states"],
        "timesteps": inputs["timestep"],
        "encoder_hidden_states_t5": noise(1, TEXT, text),
        "encoder_hidden_states_llama3": [noise(1, TEXT, llama) for _ in range(max(c.llama_layers) + 1)],
        "pooled_embeds": noise(1, c.text_emb_dim),
    }


def _sizes() -> dict[str, Tensor]:
    return {"target_size": torch.full((1, 2), 64.0), "crop_coords": torch.zeros(1, 2)}


def _cogview(c: Any) -> dict[str, Any]:
    return _plane(c, c.text_embed_dim) | _sizes() | {"original_size": torch.full((1, 2), 64.0)}


def _glm_image(c: Any) -> dict[str, Any]:
    tokens = torch.arange(SIDE * SIDE)[None]
    prior = {"prior_token_id": tokens, "prior_token_drop": torch.zeros_like(tokens, dtype=torch.bool)}
    return _plane(c, c.text_embed_dim) | _sizes() | prior


def _pixart(c: Any) -> dict[str, Any]:
    sizes = {"resolution": torch.full((1, 2), 64.0), "aspect_ratio": torch.ones(1, 1)}
    given = sizes if c.use_additional_conditions or c.sample_size == 128 else dict.fromkeys(sizes)
    return _plane(c, c.caption_channels) | {"encoder_attention_mask": torch.ones(1, TEXT), "added_cond_kwargs": given}


def _dit(c: Any) -> dict[str, Any]:
    return _plane(c, None) | {"class_labels": torch.tensor([1])}


def _sana(c: Any) -> dict[str, Any]:
    inputs = _plane(c, c.caption_channels) | {"encoder_attention_mask": torch.ones(1, TEXT)}
    return inputs | ({"guidance": time(0.45)} if c.guidance_embeds else {})


def _hunyuan_dit(c: Any) -> dict[str, Any]:
    angles = noise(SIDE * SIDE, c.attention_head_dim // 2).repeat_interleave(2, dim=1)
    extra = {}
    if c.use_style_cond_and_image_meta_size:
        extra = {"image_meta_size": torch.full((1, 6), 64.0), "style": torch.tensor([0])}
    return _plane(c, c.cross_attention_dim) | {
        "encoder_hidden_states": noise(1, c.text_len, c.cross_attention_dim),
        "text_embedding_mask": _mask(c.text_len),
        "encoder_hidden_states_t5": noise(1, c.text_len_t5, c.cross_attention_dim_t5),
        "text_embedding_mask_t5": _mask(c.text_len_t5),
        "image_rotary_emb": (angles.cos(), angles.sin()),
        **extra,
    }


def _lumina2(c: Any) -> dict[str, Any]:
    return _plane(c, c.cap_feat_dim, 0.7) | {"encoder_attention_mask": _mask()}


def _zimage(c: Any) -> dict[str, Any]:
    side = SIDE * c.all_patch_size[0]
    image = noise(c.in_channels, c.all_f_patch_size[0], side, side)
    return {"x": [image], "t": time(0.7), "cap_feats": [noise(TEXT, c.cap_feat_dim)]}


def _omnigen(c: Any) -> dict[str, Any]:
    length = TEXT + 1 + SIDE * SIDE
    return _plane(c, None, 0.7) | {
        "input_ids": torch.arange(TEXT)[None],
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(1, length, length).tril(),
        "position_ids": torch.arange(length)[None],
    }


def _prx(c: Any) -> dict[str, Any]:
    return _plane(c, c.context_in_dim, 0.7) | {"attention_mask": _mask()}


def _krea2(c: Any) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, SIDE * SIDE, c.in_channels),
        "encoder_hidden_states": noise(1, TEXT, c.num_text_layers, c.text_hidden_dim),
        "timestep": time(0.7),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), _places()]),
        "encoder_attention_mask": _mask(),
    }


def _lumina_next(c: Any) -> dict[str, Any]:
    angles = noise(384, 384, c.hidden_size // c.num_attention_heads // 2)
    return _plane(c, c.cross_attention_dim, 0.7) | {
        "encoder_mask": _mask(),
        "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
        "cross_attention_kwargs": {},
    }


def _fibo2(c: Any) -> dict[str, Any]:
    text = noise(1, 1 + len(c.injection_layer_ids), TEXT, c.cap_feat_dim)
    return _plane(c, None, 0.7) | {"encoder_hidden_states": text, "encoder_attention_mask": _mask()}


def _qwen21(c: Any) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, SIDE * SIDE, c.in_channels),
        "encoder_hidden_states": noise(1, TEXT, c.context_in_dim),
        "timestep": time(0.7),
        "img_shapes": [[(1, SIDE, SIDE)]],
        "img_mask": torch.tensor([[False] * TEXT + [True] * (SIDE * SIDE // 4)]),
        "encoder_hidden_states_mask": _mask(),
    }


def _nucleus(c: Any) -> dict[str, Any]:
    return _packed(c) | {"img_shapes": [(1, SIDE, SIDE)], "encoder_hidden_states_mask": _mask()}


def _ideogram4(c: Any) -> dict[str, Any]:
    length = TEXT + SIDE * SIDE
    places = torch.cat([torch.arange(float(TEXT))[:, None].expand(-1, 3), 65536 + _places()]).long()
    return {
        "hidden_states": noise(1, length, c.in_channels),
        "timestep": time(0.7),
        "encoder_hidden_states": noise(1, length, c.llm_features_dim),
        "position_ids": places[None],
        "segment_ids": torch.zeros(1, length, dtype=torch.long),
        "indicator": torch.tensor([[3] * TEXT + [2] * (SIDE * SIDE)]),
    }


IMAGE_SAMPLES: dict[str, Sample] = {
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux2,
    "ChromaTransformer2DModel": _flux_kin,
    "BriaTransformer2DModel": _bria,
    "BriaFiboTransformer2DModel": _bria_fibo,
    "LongCatImageTransformer2DModel": _flux_kin,
    "OvisImageTransformer2DModel": _flux_kin,
    "QwenImageTransformer2DModel": _qwen,
    "HunyuanImageTransformer2DModel": _hunyuan_image,
    "AuraFlowTransformer2DModel": _auraflow,
    "HiDreamImageTransformer2DModel": _hidream,
    "CogView3PlusTransformer2DModel": _cogview,
    "CogView4Transformer2DModel": _cogview,
    "GlmImageTransformer2DModel": _glm_image,
    "PixArtTransformer2DModel": _pixart,
    "DiTTransformer2DModel": _dit,
    "SanaTransformer2DModel": _sana,
    "HunyuanDiT2DModel": _hunyuan_dit,
    "Lumina2Transformer2DModel": _lumina2,
    "ZImageTransformer2DModel": _zimage,
    "OmniGenTransformer2DModel": _omnigen,
    "PRXTransformer2DModel": _prx,
    "Krea2Transformer2DModel": _krea2,
    "Ideogram4Transformer2DModel": _ideogram4,
    "LuminaNextDiT2DModel": _lumina_next,
    "BriaFibo2Transformer2DModel": _fibo2,
    "QwenImage21Transformer2DModel": _qwen21,
    "NucleusMoEImageTransformer2DModel": _nucleus,
}
