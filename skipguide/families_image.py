"""Data only: the blocks of the image transformers of diffusers, matched by class name."""

from __future__ import annotations

from skipguide.blocks import BlockSpec, ModelSpec, Sublayer
from skipguide.families_words import JOINT_ATTN, PARALLEL_MLP, ROPE, TEXT_AND_VIDEO, paths

_SD3 = BlockSpec(
    "transformer_blocks",
    streams=TEXT_AND_VIDEO,
    returns=("encoder_hidden_states", "hidden_states"),
    attn=(JOINT_ATTN, Sublayer("attn2")),  # attn2: a second self-attention of the image (SD3.5 medium)
    mlp=paths("ff", "ff_context"),
    joint="video_first",
)
_FLUX_DUAL = BlockSpec(
    "transformer_blocks",
    streams=TEXT_AND_VIDEO,
    returns=("encoder_hidden_states", "hidden_states"),
    attn=(JOINT_ATTN,),
    mlp=paths("ff", "ff_context"),
    joint="text_first",
    shared=ROPE,
)
_FLUX_SINGLE = BlockSpec(
    "single_transformer_blocks",
    streams=TEXT_AND_VIDEO,
    returns=("encoder_hidden_states", "hidden_states"),
    attn=paths("attn"),  # sees the two streams already concatenated
    mlp=PARALLEL_MLP,
    joint="text_first",
    shared=ROPE,
)

IMAGE_FAMILIES: dict[str, ModelSpec] = {
    "SD3Transformer2DModel": ModelSpec((_SD3,)),
    "FluxTransformer2DModel": ModelSpec((_FLUX_DUAL, _FLUX_SINGLE), shared=("txt_ids", "img_ids")),
}
