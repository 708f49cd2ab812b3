"""Data only: the image transformers of diffusers in which text and image are attended jointly, matched by class name.

Where a later stack sees text and image as one packed sequence, its blocks cannot tell which tokens are the image's, so
`"attn_identity"` is a part of the earlier blocks only.
"""

from __future__ import annotations

from dataclasses import replace

from skipguide.families.common import (
    IMG_IDS,
    JOINT_ATTN,
    JOINT_ATTN1,
    PACKED,
    PARALLEL_MLP,
    PICTURE,
    PLACES,
    ROPE,
    TEXT_AND_VIDEO,
    anything,
    paths,
)
from skipguide.spec import BlockSpec, ModelSpec, Sublayer, TokenGrid

_TEXT_FIRST_OUT = ("encoder_hidden_states", "hidden_states")

_SD3 = BlockSpec(
    "transformer_blocks",
    streams=TEXT_AND_VIDEO,
    returns=_TEXT_FIRST_OUT,
    attn=(JOINT_ATTN, Sublayer("attn2")),  # attn2: a second self-attention of the image (SD3.5 medium)
    mlp=paths("ff", "ff_context"),
    joint="video_first",
)
_FLUX_DUAL = BlockSpec(
    "transformer_blocks",
    streams=TEXT_AND_VIDEO,
    returns=_TEXT_FIRST_OUT,
    attn=(JOINT_ATTN,),
    mlp=paths("ff", "ff_context"),
    joint="text_first",
    shared=ROPE,
)
_FLUX_SINGLE = BlockSpec(
    "single_transformer_blocks",
    streams=TEXT_AND_VIDEO,
    returns=_TEXT_FIRST_OUT,
    attn=paths("attn"),  # sees the two streams already concatenated
    mlp=PARALLEL_MLP,
    joint="text_first",
    shared=ROPE,
)
_FLUX = ModelSpec((_FLUX_DUAL, _FLUX_SINGLE), shared=PLACES, grid=IMG_IDS)
# Chroma and Bria FIBO: the single blocks get text and image as one sequence.
_PACKED_SINGLE = replace(
    _FLUX_SINGLE, streams=("hidden_states",), returns=(), joint="", identity=False, image=False, why=PACKED
)
# Flux 2: attention and feed-forward of the single blocks are one module, in and out.
_FLUX2 = replace(_FLUX_DUAL, mlp=anything("ff", "ff_context"))
_FLUX2_SINGLE = BlockSpec("single_transformer_blocks", shared=ROPE, image=False, why=PACKED)

_QWEN = replace(_FLUX_DUAL, mlp=paths("img_mlp", "txt_mlp"))
_HUNYUAN_IMAGE = replace(_FLUX_DUAL, returns=(), joint="video_first")
_HUNYUAN_IMAGE_SINGLE = replace(_HUNYUAN_IMAGE, stack="single_transformer_blocks", attn=(JOINT_ATTN,), mlp=PARALLEL_MLP)
_AURAFLOW = replace(_FLUX_DUAL, stack="joint_transformer_blocks", mlp=anything("ff", "ff_context"), shared=())
_AURAFLOW_SINGLE = BlockSpec(
    "single_transformer_blocks", attn=paths("attn"), mlp=anything("ff"), identity=False, image=False, why=PACKED
)
_HIDREAM = BlockSpec(
    "double_stream_blocks",
    streams=TEXT_AND_VIDEO,
    attn=(Sublayer("block.attn1", outputs=("norm_hidden_states", "norm_encoder_hidden_states")),),
    mlp=anything("block.ff_i", "block.ff_t"),
    joint="video_first",
)
_HIDREAM_SINGLE = BlockSpec(
    "single_stream_blocks",
    attn=anything("block.attn1"),
    mlp=anything("block.ff_i"),
    identity=False,
    image=False,
    why=PACKED,
)
_COGVIEW3 = BlockSpec(
    "transformer_blocks", streams=TEXT_AND_VIDEO, attn=(JOINT_ATTN1,), mlp=paths("ff"), joint="text_first"
)
# The feed-forward runs for the image, then for the text.
_COGVIEW4 = replace(_COGVIEW3, mlp=(Sublayer("ff", calls=2),), shared=ROPE)

IMAGE_JOINT_FAMILIES: dict[str, ModelSpec] = {
    "SD3Transformer2DModel": ModelSpec((_SD3,), grid=PICTURE),
    "FluxTransformer2DModel": _FLUX,
    "BriaTransformer2DModel": _FLUX,
    "LongCatImageTransformer2DModel": _FLUX,
    "OvisImageTransformer2DModel": _FLUX,
    "ChromaTransformer2DModel": ModelSpec((_FLUX_DUAL, _PACKED_SINGLE), shared=PLACES, grid=IMG_IDS),
    "BriaFiboTransformer2DModel": ModelSpec((_FLUX_DUAL, _PACKED_SINGLE), shared=PLACES, grid=IMG_IDS),
    "Flux2Transformer2DModel": ModelSpec((_FLUX2, _FLUX2_SINGLE), shared=PLACES, grid=IMG_IDS, cache="kv_cache"),
    "QwenImageTransformer2DModel": ModelSpec((_QWEN,), grid=TokenGrid("shapes", "img_shapes", frames=False)),
    "HunyuanImageTransformer2DModel": ModelSpec((_HUNYUAN_IMAGE, _HUNYUAN_IMAGE_SINGLE), grid=PICTURE),
    "AuraFlowTransformer2DModel": ModelSpec((_AURAFLOW, _AURAFLOW_SINGLE), grid=PICTURE),
    "HiDreamImageTransformer2DModel": ModelSpec(
        (_HIDREAM, _HIDREAM_SINGLE), layered=("encoder_hidden_states_llama3",), grid=PICTURE
    ),
    "CogView3PlusTransformer2DModel": ModelSpec((_COGVIEW3,), grid=PICTURE),
    "CogView4Transformer2DModel": ModelSpec((_COGVIEW4,), shared=ROPE, grid=PICTURE),
    "GlmImageTransformer2DModel": ModelSpec((_COGVIEW4,), shared=ROPE, grid=PICTURE),
}
