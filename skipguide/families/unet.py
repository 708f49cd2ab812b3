"""Data only: the transformer blocks of the UNets of diffusers that have temporal layers, matched by class name.

Two stacks, `"spatial"` and `"temporal"`, each over the whole UNet in execution order: down, middle, up. The layers
between the blocks (residual convolutions, down- and upsampling) are not blocks. Long connections lead from the way down
to the way up, so a pass that resumes needs what every earlier block returned (`kept`); what lies between the blocks
is computed again from that.
"""

from __future__ import annotations

from skipguide.families.common import paths
from skipguide.spec import BlockSpec, ModelSpec, TokenGrid


def _everywhere(path: str) -> str:
    return "|".join(f"{place}.{path}" for place in ("down_blocks.*", "mid_block", "up_blocks.*"))


_SPATIAL = BlockSpec(
    _everywhere("attentions.*.transformer_blocks"),
    name="spatial",
    attn=paths("attn1"),
    cross_attn=paths("attn2"),
    mlp=paths("ff"),
    kept=True,
    axes="hw",
)
_SVD_TEMPORAL = BlockSpec(
    _everywhere("attentions.*.temporal_transformer_blocks"),
    name="temporal",
    attn=paths("attn1"),
    cross_attn=paths("attn2"),
    mlp=paths("ff_in", "ff"),
    kept=True,
    folded=("encoder_hidden_states",),  # one row per position, where hidden_states has one per frame
    axes="t",
)
_MOTION = BlockSpec(
    _everywhere("motion_modules.*.transformer_blocks"),
    name="temporal",
    attn=paths("attn1", "attn2"),  # both see the frames only
    mlp=paths("ff"),
    kept=True,
    axes="t",
)

UNET_FAMILIES: dict[str, ModelSpec] = {
    "UNetSpatioTemporalConditionModel": ModelSpec(
        (_SPATIAL, _SVD_TEMPORAL), interleaved=True, grid=TokenGrid("bfchw", "sample", (), halved=True)
    ),
    "UNetMotionModel": ModelSpec(
        (_SPATIAL, _MOTION),
        nested=True,
        folded=("encoder_hidden_states",),
        grid=TokenGrid("bcfhw", "sample", (), halved=True),
    ),
}
