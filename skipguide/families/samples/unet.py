"""Random inputs for the UNets, from a model's config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from skipguide.families.samples.video import TEXT, noise, time

FRAMES, SIDE = 3, 8
HINT, HINT_CHANNELS = 8, 4  # how much larger than latents it is, and what it becomes


def _width(dimension: Any) -> int:
    """Width of the text, which UNets may have per place."""
    found = dimension[0] if isinstance(dimension, (list, tuple)) else dimension
    return int(found)


def _svd(c: Any) -> dict[str, Any]:
    ids = c.projection_class_embeddings_input_dim // c.addition_time_embed_dim
    return {
        "sample": noise(1, FRAMES, c.in_channels, SIDE, SIDE),
        "timestep": time(),
        "encoder_hidden_states": noise(1, 1, _width(c.cross_attention_dim)),
        "added_time_ids": noise(1, ids).abs(),
    }


def _animatediff(c: Any) -> dict[str, Any]:
    inputs: dict[str, Any] = {
        "sample": noise(1, c.in_channels, FRAMES, SIDE, SIDE),
        "timestep": time(),
        "encoder_hidden_states": noise(FRAMES, TEXT, _width(c.cross_attention_dim)),
    }
    return inputs | _added(c)


def _added(c: Any) -> dict[str, Any]:
    """What is embedded beside the text: a pooled text and sizes (XL), or the picture that a prior has predicted."""
    kind = c.addition_embed_type
    if kind == "text_time":
        pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
        return {"added_cond_kwargs": {"text_embeds": noise(1, pooled), "time_ids": noise(1, 6).abs()}}
    if kind in ("image", "image_hint", "text_image"):
        width = _width(c.cross_attention_dim) if kind == "text_image" else c.encoder_hid_dim
        added = {"image_embeds": noise(1, width)}
        if kind == "text_image":
            added["text_embeds"] = noise(1, width)
        if kind == "image_hint":
            added["hint"] = noise(1, 3, HINT * SIDE, HINT * SIDE)
        return {"added_cond_kwargs": added}
    return {}


def _picture(c: Any) -> dict[str, Any]:
    own_text = c.encoder_hid_dim_type in ("text_proj", "text_image_proj")
    width = c.encoder_hid_dim if own_text else _width(c.cross_attention_dim)
    hint = HINT_CHANNELS if c.addition_embed_type == "image_hint" else 0
    inputs: dict[str, Any] = {
        "sample": noise(1, c.in_channels - hint, SIDE, SIDE),
        "timestep": time(),
        "encoder_hidden_states": noise(1, TEXT, width),
    }
    if c.class_embed_type == "projection":
        inputs["class_labels"] = noise(1, c.projection_class_embeddings_input_dim)
    elif c.class_embed_type == "timestep" or c.num_class_embeds:
        inputs["class_labels"] = time(3).long()
    return inputs | _added(c)


UNET_SAMPLES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "UNetSpatioTemporalConditionModel": _svd,
    "UNetMotionModel": _animatediff,
    "UNet2DConditionModel": _picture,
}
