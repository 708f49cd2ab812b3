"""Data only: the blocks of the video transformers of diffusers, matched by class name."""

from __future__ import annotations

from skipguide.blocks import BlockSpec, ModelSpec
from skipguide.families_words import JOINT_ATTN, JOINT_ATTN1, PARALLEL_MLP, ROPE, TEXT_AND_VIDEO, paths

_LTX = BlockSpec("transformer_blocks", attn=paths("attn1"), cross_attn=paths("attn2"), mlp=paths("ff"))
_WAN = BlockSpec("blocks", attn=paths("attn1"), cross_attn=paths("attn2"), mlp=paths("ffn"), shared=ROPE)
_COGVIDEOX = BlockSpec(
    "transformer_blocks",
    streams=TEXT_AND_VIDEO,
    attn=(JOINT_ATTN1,),
    mlp=paths("ff"),
    joint="text_first",
    shared=ROPE,
)
_MOCHI = BlockSpec(
    "transformer_blocks",
    streams=TEXT_AND_VIDEO,
    attn=(JOINT_ATTN1,),
    mlp=paths("ff", "ff_context"),
    joint="video_first",
    shared=ROPE,
)
_HUNYUAN_DUAL = BlockSpec(
    "transformer_blocks",
    streams=TEXT_AND_VIDEO,
    attn=(JOINT_ATTN,),
    mlp=paths("ff", "ff_context"),
    joint="video_first",
    shared=ROPE,
)
_HUNYUAN_SINGLE = BlockSpec(
    "single_transformer_blocks",
    streams=TEXT_AND_VIDEO,
    attn=(JOINT_ATTN,),
    mlp=PARALLEL_MLP,
    joint="video_first",
    shared=ROPE,
)
_LATTE_SPATIAL = BlockSpec("transformer_blocks", attn=paths("attn1"), cross_attn=paths("attn2"), mlp=paths("ff"))
_LATTE_TEMPORAL = BlockSpec("temporal_transformer_blocks", attn=paths("attn1"), mlp=paths("ff"))

VIDEO_FAMILIES: dict[str, ModelSpec] = {
    "LTXVideoTransformer3DModel": ModelSpec((_LTX,)),
    "WanTransformer3DModel": ModelSpec((_WAN,)),
    "CogVideoXTransformer3DModel": ModelSpec((_COGVIDEOX,), shared=ROPE),
    "MochiTransformer3DModel": ModelSpec((_MOCHI,)),
    "HunyuanVideoTransformer3DModel": ModelSpec((_HUNYUAN_DUAL, _HUNYUAN_SINGLE)),
    "HunyuanVideo15Transformer3DModel": ModelSpec((_HUNYUAN_DUAL,)),
    "LatteTransformer3DModel": ModelSpec((_LATTE_SPATIAL, _LATTE_TEMPORAL), interleaved=True),
}
