"""Data only: the image transformers of diffusers whose blocks have one stream, matched by class name.

The text comes in by cross-attention, or is packed into the stream; blocks on a packed stream cannot tell which of its
tokens are the image's, so they have no `"attn_identity"`.
"""

from __future__ import annotations

from dataclasses import replace

from skipguide.families.common import ROPE, anything, paths
from skipguide.spec import BlockSpec, ModelSpec, Sublayer

_PIXART = BlockSpec("transformer_blocks", attn=paths("attn1"), cross_attn=paths("attn2"), mlp=paths("ff"))
# Linear attention has no attention map that could be the identity.
_SANA = replace(_PIXART, identity=False)
# Long skip connections: the second half of the blocks reads what the first half returned.
_HUNYUAN_DIT = replace(_PIXART, stack="blocks", shared=ROPE, kept=True)
_DIT = replace(_PIXART, cross_attn=())

_LUMINA2 = BlockSpec("layers", attn=paths("attn"), mlp=anything("feed_forward"), identity=False, padded=True)
_ZIMAGE = BlockSpec(
    "layers", streams=("x",), attn=paths("attention"), mlp=anything("feed_forward"), identity=False, padded=True
)
_PRX = BlockSpec(
    "blocks",
    attn=paths("attention"),
    # the three layers of the gated feed-forward are the block's own
    mlp=tuple(Sublayer(name, outputs=("",), width="out_features") for name in ("gate_proj", "up_proj", "down_proj")),
    identity=False,  # queries, keys and values are one projection
)
_PACKED = BlockSpec("layers", attn=paths("self_attn"), mlp=paths("mlp"), identity=False)

IMAGE_SINGLE_FAMILIES: dict[str, ModelSpec] = {
    "PixArtTransformer2DModel": ModelSpec((_PIXART,)),
    "DiTTransformer2DModel": ModelSpec((_DIT,)),
    "SanaTransformer2DModel": ModelSpec((_SANA,)),
    "HunyuanDiT2DModel": ModelSpec((_HUNYUAN_DIT,), shared=ROPE),
    # the refined text waits while the image is refined, and the other way round in Z-Image
    "Lumina2Transformer2DModel": ModelSpec(
        (replace(_LUMINA2, stack="context_refiner", kept=True), replace(_LUMINA2, stack="noise_refiner"), _LUMINA2)
    ),
    "ZImageTransformer2DModel": ModelSpec(
        (
            replace(_ZIMAGE, stack="noise_refiner", kept=True, identity=True),
            replace(_ZIMAGE, stack="context_refiner"),
            _ZIMAGE,
        ),
        listed=("x", "cap_feats"),
    ),
    "OmniGenTransformer2DModel": ModelSpec((_PACKED,)),
    "PRXTransformer2DModel": ModelSpec((_PRX,)),
    "Krea2Transformer2DModel": ModelSpec(
        (BlockSpec("transformer_blocks", attn=paths("attn"), mlp=paths("ff"), shared=ROPE, identity=False),),
        shared=("position_ids",),
    ),
}
