"""Data only: the blocks of Wan and of the video transformers made like it, matched by class name."""

from __future__ import annotations

from skipguide.families.common import FRAMES_FIRST, ROPE, VIDEO, paths
from skipguide.spec import BlockSpec, ModelSpec

_WAN = BlockSpec("blocks", attn=paths("attn1"), cross_attn=paths("attn2"), mlp=paths("ffn"), shared=ROPE)
# VACE's control blocks come first: each gives a hint, which the model adds behind one of its video blocks.
_VACE = BlockSpec(
    "vace_blocks",
    streams=("control_hidden_states",),
    adds=("hidden_states",),
    kept=True,
    attn=paths("attn1"),
    cross_attn=paths("attn2"),
    mlp=paths("ffn"),
    shared=ROPE,
)
# Helios makes rotary tables per clip
_HELIOS = BlockSpec("blocks", attn=paths("attn1"), cross_attn=paths("attn2"), mlp=paths("ffn"))

WAN_FAMILIES: dict[str, ModelSpec] = {
    "WanTransformer3DModel": ModelSpec((_WAN,), grid=VIDEO),
    "WanVACETransformer3DModel": ModelSpec((_VACE, _WAN), shared=("control_hidden_states_scale",), grid=VIDEO),
    "WanAnimateTransformer3DModel": ModelSpec((_WAN,), grid=VIDEO),
    "SkyReelsV2Transformer3DModel": ModelSpec((_WAN,), shared=("fps",), grid=VIDEO),
    "ChronoEditTransformer3DModel": ModelSpec((_WAN,), grid=VIDEO),
    "AnyFlowTransformer3DModel": ModelSpec((_WAN,), grid=FRAMES_FIRST),
    "HeliosTransformer3DModel": ModelSpec((_HELIOS,)),
}
