"""Data only: the blocks of the video transformers of diffusers, matched by class name."""

from __future__ import annotations

from skipguide.families.av import AUDIO_VIDEO_FAMILIES
from skipguide.families.common import JOINT_ATTN, JOINT_ATTN1, PARALLEL_MLP, ROPE, TEXT_AND_VIDEO, paths
from skipguide.families.wan import WAN_FAMILIES
from skipguide.spec import BlockSpec, ModelSpec, Sublayer

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
_ALLEGRO = BlockSpec("transformer_blocks", attn=paths("attn1"), cross_attn=paths("attn2"), mlp=paths("ff"), shared=ROPE)
_COSMOS = BlockSpec("transformer_blocks", attn=paths("attn1"), cross_attn=paths("attn2"), mlp=paths("ff"), shared=ROPE)
_SANA = BlockSpec(
    "transformer_blocks",
    attn=paths("attn1"),
    cross_attn=paths("attn2"),
    mlp=paths("ff"),
    shared=ROPE,
    identity=False,  # linear attention has no map that could be the identity
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
    "LTXVideoTransformer3DModel": ModelSpec((_LTX,)),
    "CogVideoXTransformer3DModel": ModelSpec((_COGVIDEOX,), shared=ROPE),
    "MochiTransformer3DModel": ModelSpec((_MOCHI,)),
    "HunyuanVideoTransformer3DModel": ModelSpec((_HUNYUAN_DUAL, _HUNYUAN_SINGLE)),
    "HunyuanVideo15Transformer3DModel": ModelSpec((_HUNYUAN_DUAL,)),
    "HunyuanVideoFramepackTransformer3DModel": ModelSpec(
        (_HUNYUAN_DUAL, _HUNYUAN_SINGLE),
        shared=(
            "indices_latents",
            "indices_latents_clean",
            "indices_latents_history_2x",
            "indices_latents_history_4x",
        ),
    ),
    "LatteTransformer3DModel": ModelSpec((_LATTE_SPATIAL, _LATTE_TEMPORAL), interleaved=True),
    "AllegroTransformer3DModel": ModelSpec((_ALLEGRO,), shared=ROPE),
    "CosmosTransformer3DModel": ModelSpec((_COSMOS,), shared=("padding_mask",)),
    "ConsisIDTransformer3DModel": ModelSpec((_COGVIDEOX,), shared=ROPE),
    "EasyAnimateTransformer3DModel": ModelSpec((_EASYANIMATE,)),
    "SanaVideoTransformer3DModel": ModelSpec((_SANA,)),
    "MotifVideoTransformer3DModel": ModelSpec((_MOTIF_DUAL, _MOTIF_SINGLE)),
    "Kandinsky5Transformer3DModel": ModelSpec(
        (_KANDINSKY5_TEXT, _KANDINSKY5), shared=("visual_rope_pos", "text_rope_pos", "sparse_params")
    ),
    **WAN_FAMILIES,
    **AUDIO_VIDEO_FAMILIES,
}
