"""Data only: the transformer blocks of the UNets of diffusers, matched by class name.

The blocks lie in execution order over the whole UNet: down, middle, up; with temporal layers in two stacks,
`"spatial"` and `"temporal"`. The layers between the blocks (residual convolutions, down- and upsampling) are not
blocks. Long connections lead from the way down to the way up, so a pass that resumes needs what every earlier block
returned (`kept`), and the convolutions before it do not run either (`stages`).
"""

from __future__ import annotations

from dataclasses import replace

from skipguide.families.common import PICTURE_AND_TEXT, paths
from skipguide.spec import BlockSpec, ModelSpec, TokenGrid


def _everywhere(path: str) -> str:
    return "|".join(f"{place}.{path}" for place in ("down_blocks.*", "mid_block", "up_blocks.*"))


_STAGES = "down_blocks.*|mid_block|up_blocks.*"
_TURNS = ("resnets", "attentions", "motion_modules")

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
_PLAIN = replace(_SPATIAL, name="transformer_blocks", optional=True)
# Kandinsky 2 and DeepFloyd IF: one attention over the picture and the text, which adds its input itself
_ADDED_KEYS = BlockSpec(
    _everywhere("attentions"),
    name="attentions",
    classes=("Attention",),
    kept=True,
    image=False,
    axes="hw",
    why=PICTURE_AND_TEXT,
    optional=True,
)

UNET_FAMILIES: dict[str, ModelSpec] = {
    "UNetSpatioTemporalConditionModel": ModelSpec(
        (_SPATIAL, _SVD_TEMPORAL),
        interleaved=True,
        grid=TokenGrid("bfchw", "sample", (), halved=True),
        stages=_STAGES,
        turns=_TURNS,
    ),
    "UNetMotionModel": ModelSpec(
        (_SPATIAL, _MOTION),
        nested=True,
        folded=("encoder_hidden_states", "down_block_additional_residuals", "mid_block_additional_residual"),
        grid=TokenGrid("bcfhw", "sample", (), halved=True),
        stages=_STAGES,
        turns=_TURNS,
    ),
    "UNet2DConditionModel": ModelSpec(
        (_PLAIN, _ADDED_KEYS),
        interleaved=True,
        grid=TokenGrid("bchw", "sample", (), frames=False, halved=True),
        stages=_STAGES,
        turns=_TURNS,
        consumed=("down_intrablock_additional_residuals",),
    ),
}
