"""The UNets with temporal layers: Stable Video Diffusion and AnimateDiff, spatial and temporal blocks kept apart."""

import diffusers

from zoo import values
from zoo.family import TEXT, BlockKind, Family, rows, timesteps

FRAMES = 3


def svd():
    """Two spatial and two temporal blocks in the middle, one of each everywhere else."""
    return diffusers.UNetSpatioTemporalConditionModel(
        sample_size=4,
        in_channels=8,
        out_channels=4,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        num_attention_heads=(2, 2),
        cross_attention_dim=24,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_frames=FRAMES,
    )


def svd_inputs(batch=2, seed=0):
    return {
        "sample": rows(batch, seed, FRAMES, 8, 4, 4),
        "timestep": timesteps(batch),
        "encoder_hidden_states": rows(batch, seed + 1, 1, 24),
        "added_time_ids": rows(batch, seed + 2, 3).abs(),
    }


def motion(**config):
    """One block of the way down and one of the way up have motion modules alone."""
    return diffusers.UNetMotionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 16),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
        use_motion_mid_block=True,
        **config,
    )


def motion_inputs(batch=2, seed=0):
    """The text is repeated for every frame, as the pipeline does it."""
    return {
        "sample": rows(batch, seed, 4, FRAMES, 4, 4),
        "timestep": timesteps(batch),
        "encoder_hidden_states": rows(batch, seed + 1, TEXT, 24).repeat_interleave(FRAMES, dim=0),
    }


SPATIAL = BlockKind(
    returns="h",
    projections={"attn": ("attn1.to_out.0",), "cross_attn": ("attn2.to_out.0",), "mlp": ("ff.net.2",)},
    values={"attn1": values.SelfValues},
)
SVD_TEMPORAL = BlockKind(
    returns="h",
    projections={
        "attn": ("attn1.to_out.0",),
        "cross_attn": ("attn2.to_out.0",),
        "mlp": ("ff_in.net.2", "ff.net.2"),
    },
    values={"attn1": values.SelfValues},
)
MOTION = BlockKind(
    returns="h",
    projections={"attn": ("attn1.to_out.0", "attn2.to_out.0"), "mlp": ("ff.net.2",)},
    values={"attn1": values.SelfValues, "attn2": values.SelfValues},
)


def pair(place: str, number: int):
    """A spatial block and the temporal one that runs after it."""
    return (
        (f"{place}.transformer_blocks.{number}", SPATIAL),
        (f"{place}.temporal_transformer_blocks.{number}", SVD_TEMPORAL),
    )


def both(place: str, number: int):
    """What runs behind residual block `number` of AnimateDiff's UNet, where there is spatial attention."""
    return (
        (f"{place}.attentions.{number}.transformer_blocks.0", SPATIAL),
        (f"{place}.motion_modules.{number}.transformer_blocks.0", MOTION),
    )


SVD_BLOCKS = (
    *pair("down_blocks.0.attentions.0", 0),
    *pair("mid_block.attentions.0", 0),
    *pair("mid_block.attentions.0", 1),
    *pair("up_blocks.1.attentions.0", 0),
    *pair("up_blocks.1.attentions.1", 0),
)
MOTION_BLOCKS = (
    *both("down_blocks.0", 0),
    ("down_blocks.1.motion_modules.0.transformer_blocks.0", MOTION),
    *both("mid_block", 0),
    ("up_blocks.0.motion_modules.0.transformer_blocks.0", MOTION),
    ("up_blocks.0.motion_modules.1.transformer_blocks.0", MOTION),
    *both("up_blocks.1", 0),
    *both("up_blocks.1", 1),
)

# a spatial and a temporal one of each on the way down and up, and one in the middle
UNETS = (
    Family("svd", svd, svd_inputs, SVD_BLOCKS, thin=(0, 3, 6, 9), slack=1e-5, visible=0.01),
    Family("animatediff", motion, motion_inputs, MOTION_BLOCKS, thin=(0, 4, 7, 10), slack=1e-5, visible=0.01),
)
