"""Data only: the image transformers of diffusers whose blocks have one stream, matched by class name.

The text comes in by cross-attention, or is packed into the stream; blocks on a packed stream cannot tell which of its
tokens are the image's, so they have no `"attn_identity"`.
"""

from __future__ import annotations

from dataclasses import replace

from skipguide.families.common import LINEAR, PACKED, PICTURE, ROPE, TEXT_ALONE, paths
from skipguide.spec import BlockSpec, ModelSpec, Sublayer

_PIXART = BlockSpec("transformer_blocks", attn=paths("attn1"), cross_attn=paths("attn2"), mlp=paths("ff"))
# Linear attention has no attention map that could be the identity.
_SANA = replace(_PIXART, identity=False, why=LINEAR)
# Long skip connections: the second half of the blocks reads what the first half returned.
_HUNYUAN_DIT = replace(_PIXART, stack="blocks", shared=ROPE, kept=True)
_DIT = replace(_PIXART, cross_attn=())

# Norms follow what attention and feed-forward return.
_LUMINA2 = BlockSpec(
    "layers",
    attn=(Sublayer("attn", scaled_at=("norm2",)),),
    mlp=(Sublayer("feed_forward", outputs=("",), scaled_at=("ffn_norm2",)),),
    identity=False,
    padded=True,
    image=False,
    why=PACKED,
)
_ZIMAGE = BlockSpec(
    "layers",
    streams=("x",),
    attn=(Sublayer("attention", scaled_at=("attention_norm2",)),),
    mlp=(Sublayer("feed_forward", outputs=("",), scaled_at=("ffn_norm2",)),),
    identity=False,
    padded=True,
    image=False,
    why=PACKED,
)
_FIBO2 = replace(
    _ZIMAGE,
    cross_attn=(Sublayer("cross_attention", scaled_at=("cross_attn_norm2",)),),
    shared=("freqs_cis", "image_rotary_emb"),
    padded=False,
)
_IDEOGRAM4 = replace(_ZIMAGE, streams=("hidden_states",), padded=False)
# text and pictures in one sequence, each picture after what it may see
_QWEN21 = BlockSpec(
    "transformer_blocks",
    attn=paths("attn"),
    mlp=(Sublayer("img_mlp", outputs=("",)),),
    shared=("rotary_emb", "target_token_mask"),
    followed=("modulation",),
    identity=False,
    image=False,
    why=PACKED,
)
_NUCLEUS = replace(
    _QWEN21,
    mlp=paths("img_mlp"),  # dense, or experts that pick their tokens, row by row
    shared=ROPE,
    followed=(),
    why="keys and values of the text stand beside the image's in its attention",
)
# Both attentions are summed, head by head, before one projection and a norm: neither is a branch of its own.
_LUMINA_NEXT = BlockSpec("layers", shared=ROPE, identity=False, why="its two attentions share one projection")
_PRX = BlockSpec(
    "blocks",
    attn=paths("attention"),
    # the three layers of the gated feed-forward are the block's own
    mlp=tuple(
        Sublayer(name, outputs=("",), width="out_features", scaled_at=("down_proj",))
        for name in ("gate_proj", "up_proj", "down_proj")
    ),
    identity=False,  # queries, keys and values are one projection
    why="queries, keys and values are one projection, of which the text has a part",
)
_PACKED = BlockSpec("layers", attn=paths("self_attn"), mlp=paths("mlp"), identity=False, image=False, why=PACKED)

IMAGE_SINGLE_FAMILIES: dict[str, ModelSpec] = {
    "PixArtTransformer2DModel": ModelSpec((_PIXART,), grid=PICTURE),
    "DiTTransformer2DModel": ModelSpec((_DIT,), grid=PICTURE),
    "SanaTransformer2DModel": ModelSpec((_SANA,), grid=PICTURE),
    # takes a ControlNet's residuals out of their list
    "HunyuanDiT2DModel": ModelSpec((_HUNYUAN_DIT,), shared=ROPE, grid=PICTURE, consumed=("controlnet_block_samples",)),
    # the refined text waits while the image is refined, and the other way round in Z-Image
    "Lumina2Transformer2DModel": ModelSpec(
        (
            replace(_LUMINA2, stack="context_refiner", kept=True, why=TEXT_ALONE),
            replace(_LUMINA2, stack="noise_refiner"),
            _LUMINA2,
        )
    ),
    "ZImageTransformer2DModel": ModelSpec(
        (
            replace(_ZIMAGE, stack="noise_refiner", kept=True, identity=True),
            replace(_ZIMAGE, stack="context_refiner", why=TEXT_ALONE),
            _ZIMAGE,
        ),
        listed=("x", "cap_feats"),
    ),
    "QwenImage21Transformer2DModel": ModelSpec((_QWEN21,), cache="kv_cache"),
    "Ideogram4Transformer2DModel": ModelSpec((_IDEOGRAM4,)),
    "NucleusMoEImageTransformer2DModel": ModelSpec((_NUCLEUS,)),
    "LuminaNextDiT2DModel": ModelSpec((_LUMINA_NEXT,), shared=ROPE, grid=PICTURE),
    "BriaFibo2Transformer2DModel": ModelSpec(
        (replace(_FIBO2, stack="noise_refiner", cross_attn=()), _FIBO2),
    ),
    "OmniGenTransformer2DModel": ModelSpec((_PACKED,)),
    "PRXTransformer2DModel": ModelSpec((_PRX,), grid=PICTURE),
    "Krea2Transformer2DModel": ModelSpec(
        (
            BlockSpec(
                "transformer_blocks",
                attn=paths("attn"),
                mlp=paths("ff"),
                shared=ROPE,
                identity=False,
                image=False,
                why=PACKED,
            ),
        ),
        shared=("position_ids",),
    ),
}
