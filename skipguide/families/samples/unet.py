"""Random inputs for the UNets with temporal layers, from a model's config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from skipguide.families.samples.video import TEXT, noise, time

FRAMES, SIDE = 3, 8


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
    if c.addition_embed_type == "text_time":  # the XL form
        pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": noise(1, pooled), "time_ids": noise(1, 6).abs()}
    return inputs


UNET_SAMPLES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "UNetSpatioTemporalConditionModel": _svd,
    "UNetMotionModel": _animatediff,
}
