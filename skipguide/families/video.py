"""Data only: the blocks of the video transformers of diffusers, matched by class name."""

from __future__ import annotations

from skipguide.families.av import AUDIO_VIDEO_FAMILIES
from skipguide.families.common import (
    FRAMES_FIRST,
    JOINT_ATTN,
    JOINT_ATTN1,
    LINEAR,
    PARALLEL_MLP,
    ROPE,
    SIZES,
    TEXT_ALONE,
    TEXT_AND_VIDEO,
    VIDEO,
    paths,
)
from skipguide.families.wan import WAN_FAMILIES
from skipguide.spec import BlockSpec, ModelSpec, Sublayer, TokenGrid

_LTX = BlockSpec("transformer_blocks", attn=paths("attn1"), cross_attn=paths("attn2"), mlp=paths("ff"))
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
    attn=(Sublayer("attn1", outputs=TEXT_AND_VIDEO, scaled_at=("norm2", "norm2_context")),),  # norms follow
    mlp=(
        Sublayer("ff", scaled_at=("norm4",)),
        Sublayer("ff_context", scaled_at=("norm4_context",)),
    ),
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
_LATTE_SPATIAL = BlockSpec(
    "transformer_blocks", attn=paths("attn1"), cross_attn=paths("attn2"), mlp=paths("ff"), axes="hw"
)
_LATTE_TEMPORAL = BlockSpec("temporal_transformer_blocks", attn=paths("attn1"), mlp=paths("ff"), axes="t")
_ALLEGRO = BlockSpec("transformer_blocks", attn=paths("attn1"), cross_attn=paths("attn2"), mlp=paths("ff"), shared=ROPE)
_COSMOS = BlockSpec("transformer_blocks", attn=paths("attn1"), cross_attn=paths("attn2"), mlp=paths("ff"), shared=ROPE)
_SANA = BlockSpec(
    "transformer_blocks",
    attn=paths("attn1"),
    cross_attn=paths("attn2"),
    mlp=paths("ff"),
    shared=ROPE,
    identity=False,
    why=LINEAR,
)
_EASYANIMATE = BlockSpec(
    "transformer_blocks",
    streams=TEXT_AND_VIDEO,
    attn=(JOINT_ATTN1,),
    mlp=paths("ff", "txt_ff"),
    joint="text_first",
    shared=ROPE,
)
_MOTIF_DUAL = BlockSpec(
    "transformer_blocks",
    streams=TEXT_AND_VIDEO,
    attn=(JOINT_ATTN,),
    cross_attn=paths("cross_attn"),
    mlp=paths("ff", "ff_context"),
    joint="video_first",
    shared=ROPE,
)
# its last blocks are a decoder: they start from the embedded video again, and see the encoder's video as their text
_MOTIF_SINGLE = BlockSpec(
    "single_transformer_blocks",
    streams=TEXT_AND_VIDEO,
    attn=(JOINT_ATTN,),
    cross_attn=paths("cross_attn"),
    mlp=PARALLEL_MLP,
    joint="video_first",
    shared=ROPE,
)
_KANDINSKY5_TEXT = BlockSpec(
    "text_transformer_blocks",
    streams=("x",),
    kept=True,  # all video blocks read the last of these texts
    image=False,
    why=TEXT_ALONE,
    attn=paths("self_attention"),
    mlp=(Sublayer("feed_forward", outputs=("x",)),),
    shared=("rope",),
)
_KANDINSKY5 = BlockSpec(
    "visual_transformer_blocks",
    streams=("visual_embed",),
    attn=paths("self_attention"),
    cross_attn=paths("cross_attention"),
    mlp=(Sublayer("feed_forward", outputs=("x",)),),
    shared=("sparse_params",),
)

VIDEO_FAMILIES: dict[str, ModelSpec] = {
    "LTXVideoTransformer3DModel": ModelSpec((_LTX,), grid=SIZES),
    "CogVideoXTransformer3DModel": ModelSpec((_COGVIDEOX,), shared=ROPE, grid=FRAMES_FIRST),
    "MochiTransformer3DModel": ModelSpec((_MOCHI,), grid=VIDEO),
    "HunyuanVideoTransformer3DModel": ModelSpec((_HUNYUAN_DUAL, _HUNYUAN_SINGLE), grid=VIDEO),
    "HunyuanVideo15Transformer3DModel": ModelSpec((_HUNYUAN_DUAL,), grid=VIDEO),
    "HunyuanVideoFramepackTransformer3DModel": ModelSpec(
        (_HUNYUAN_DUAL, _HUNYUAN_SINGLE),
        shared=(
            "indices_latents",
            "indices_latents_clean",
            "indices_latents_history_2x",
            "indices_latents_history_4x",
        ),
    ),
    "LatteTransformer3DModel": ModelSpec((_LATTE_SPATIAL, _LATTE_TEMPORAL), interleaved=True, grid=VIDEO),
    "AllegroTransformer3DModel": ModelSpec((_ALLEGRO,), shared=ROPE, grid=VIDEO),
    "CosmosTransformer3DModel": ModelSpec((_COSMOS,), shared=("padding_mask",), grid=VIDEO),
    "ConsisIDTransformer3DModel": ModelSpec((_COGVIDEOX,), shared=ROPE, grid=FRAMES_FIRST),
    "EasyAnimateTransformer3DModel": ModelSpec((_EASYANIMATE,), grid=VIDEO),
    "SanaVideoTransformer3DModel": ModelSpec((_SANA,), grid=VIDEO),
    "MotifVideoTransformer3DModel": ModelSpec((_MOTIF_DUAL, _MOTIF_SINGLE), grid=VIDEO),
    "Kandinsky5Transformer3DModel": ModelSpec(
        (_KANDINSKY5_TEXT, _KANDINSKY5),
        shared=("visual_rope_pos", "text_rope_pos", "sparse_params"),
        grid=TokenGrid("bfhwc"),
    ),
    **WAN_FAMILIES,
    **AUDIO_VIDEO_FAMILIES,
}
