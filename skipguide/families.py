"""Data only: the blocks of every supported model family, matched by class name.

Each entry is proven in the tests on a tiny random instance: block skip against the block replaced by an identity,
sublayer skips against zeroed output projections, attention identity against a reference written by hand.
"""

from __future__ import annotations

from skipguide.blocks import BlockSpec, ModelSpec, Sublayer
from skipguide.families_vision import VISION_FAMILIES

_TEXT_AND_VIDEO = ("hidden_states", "encoder_hidden_states")
_ROPE = ("image_rotary_emb", "freqs_cis", "rotary_emb")


def _paths(*paths: str) -> tuple[Sublayer, ...]:
    return tuple(Sublayer(path) for path in paths)


# Attention over text and video together returns one output per stream.
_JOINT_ATTN = Sublayer("attn", outputs=_TEXT_AND_VIDEO)
_JOINT_ATTN1 = Sublayer("attn1", outputs=_TEXT_AND_VIDEO)
# Parallel blocks: the feed-forward's residual contribution is what proj_mlp feeds to proj_out (act(0) = 0).
_PARALLEL_MLP = (Sublayer("proj_mlp", width="out_features"),)

_LTX = BlockSpec("transformer_blocks", attn=_paths("attn1"), cross_attn=_paths("attn2"), mlp=_paths("ff"))
_WAN = BlockSpec("blocks", attn=_paths("attn1"), cross_attn=_paths("attn2"), mlp=_paths("ffn"), shared=_ROPE)
_COGVIDEOX = BlockSpec(
    "transformer_blocks",
    streams=_TEXT_AND_VIDEO,
    attn=(_JOINT_ATTN1,),
    mlp=_paths("ff"),
    joint="text_first",
    shared=_ROPE,
)
_MOCHI = BlockSpec(
    "transformer_blocks",
    streams=_TEXT_AND_VIDEO,
    attn=(_JOINT_ATTN1,),
    mlp=_paths("ff", "ff_context"),
    joint="video_first",
    shared=_ROPE,
)
_HUNYUAN_DUAL = BlockSpec(
    "transformer_blocks",
    streams=_TEXT_AND_VIDEO,
    attn=(_JOINT_ATTN,),
    mlp=_paths("ff", "ff_context"),
    joint="video_first",
    shared=_ROPE,
)
_HUNYUAN_SINGLE = BlockSpec(
    "single_transformer_blocks",
    streams=_TEXT_AND_VIDEO,
    attn=(_JOINT_ATTN,),
    mlp=_PARALLEL_MLP,
    joint="video_first",
    shared=_ROPE,
)
_SD3 = BlockSpec(
    "transformer_blocks",
    streams=_TEXT_AND_VIDEO,
    returns=("encoder_hidden_states", "hidden_states"),
    attn=(_JOINT_ATTN, Sublayer("attn2")),  # attn2: a second self-attention of the image (SD3.5 medium)
    mlp=_paths("ff", "ff_context"),
    joint="video_first",
)
_FLUX_DUAL = BlockSpec(
    "transformer_blocks",
    streams=_TEXT_AND_VIDEO,
    returns=("encoder_hidden_states", "hidden_states"),
    attn=(_JOINT_ATTN,),
    mlp=_paths("ff", "ff_context"),
    joint="text_first",
    shared=_ROPE,
)
_FLUX_SINGLE = BlockSpec(
    "single_transformer_blocks",
    streams=_TEXT_AND_VIDEO,
    returns=("encoder_hidden_states", "hidden_states"),
    attn=_paths("attn"),  # sees the two streams already concatenated
    mlp=_PARALLEL_MLP,
    joint="text_first",
    shared=_ROPE,
)
_LATTE_SPATIAL = BlockSpec("transformer_blocks", attn=_paths("attn1"), cross_attn=_paths("attn2"), mlp=_paths("ff"))
_LATTE_TEMPORAL = BlockSpec("temporal_transformer_blocks", attn=_paths("attn1"), mlp=_paths("ff"))

FAMILIES: dict[str, ModelSpec] = {
    "LTXVideoTransformer3DModel": ModelSpec((_LTX,)),
    "WanTransformer3DModel": ModelSpec((_WAN,)),
    "CogVideoXTransformer3DModel": ModelSpec((_COGVIDEOX,), shared=_ROPE),
    "MochiTransformer3DModel": ModelSpec((_MOCHI,)),
    "HunyuanVideoTransformer3DModel": ModelSpec((_HUNYUAN_DUAL, _HUNYUAN_SINGLE)),
    "HunyuanVideo15Transformer3DModel": ModelSpec((_HUNYUAN_DUAL,)),
    "LatteTransformer3DModel": ModelSpec((_LATTE_SPATIAL, _LATTE_TEMPORAL), interleaved=True),
    "SD3Transformer2DModel": ModelSpec((_SD3,)),
    "FluxTransformer2DModel": ModelSpec((_FLUX_DUAL, _FLUX_SINGLE), shared=("txt_ids", "img_ids")),
    **VISION_FAMILIES,
}
