"""The UNets that make pictures: of Stable Diffusion 1.5 and 2, of XL, and of Kandinsky 2."""

import diffusers
from torch import nn

from zoo.family import TEXT, BlockKind, Family, rows, timesteps
from zoo.unet import SPATIAL

SIDE, TEXT_WIDTH = 8, 24
POOLED, SIZES, TIME_WIDTH = 12, 6, 8
IMAGE = 20


def picture(in_channels=4, out_channels=4, **config):
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": SIDE,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "block_out_channels": (16, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "cross_attention_dim": TEXT_WIDTH,
            "attention_head_dim": 2,
            **config,
        }
    )


def sd(**config):
    """Attention where the picture is large, and in the middle; a convolution leads into it and out."""
    return picture(**config)


def sdxl(**config):
    """Attention where the picture is small, with more than one block at a place."""
    return picture(
        **{
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": TIME_WIDTH,
            "projection_class_embeddings_input_dim": SIZES * TIME_WIDTH + POOLED,
            **config,
        }
    )


def added_keys(**config):
    """Attention over picture and text together; what the denoiser predicts has variances."""
    return picture(
        **{
            "out_channels": 8,
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "attention_head_dim": 8,
            **config,
        }
    )


def kandinsky(**config):
    return added_keys(
        **{
            "encoder_hid_dim": IMAGE,
            "encoder_hid_dim_type": "image_proj",
            "addition_embed_type": "image",
            "resnet_time_scale_shift": "scale_shift",
            **config,
        }
    )


def plane(batch=2, seed=0):
    return {"sample": rows(batch, seed, 4, SIDE, SIDE), "timestep": timesteps(batch)}


def sd_inputs(batch=2, seed=0):
    return plane(batch, seed) | {"encoder_hidden_states": rows(batch, seed + 1, TEXT, TEXT_WIDTH)}


def sdxl_inputs(batch=2, seed=0):
    added = {"text_embeds": rows(batch, seed + 2, POOLED), "time_ids": rows(batch, seed + 3, SIZES).abs()}
    return sd_inputs(batch, seed) | {"added_cond_kwargs": added}


def kandinsky_inputs(batch=2, seed=0):
    added = {"image_embeds": rows(batch, seed + 1, IMAGE)}
    return plane(batch, seed) | {"encoder_hidden_states": None, "added_cond_kwargs": added}


def no_text(inputs):
    return 0


class Input(nn.Module):
    """In place of an attention that adds its input itself."""

    def forward(self, hidden_states, **kwargs):
        return hidden_states


ADDED_KEYS = BlockKind(returns="h", projections={}, identity=Input)

SD_BLOCKS = tuple(
    (f"{place}.transformer_blocks.0", SPATIAL)
    for place in (
        "down_blocks.0.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.1",
    )
)
SDXL_BLOCKS = tuple(
    (f"{place}.transformer_blocks.{number}", SPATIAL)
    for place in (
        "down_blocks.1.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.0.attentions.0",
        "up_blocks.0.attentions.1",
    )
    for number in range(2)
)
KANDINSKY_BLOCKS = tuple(
    (f"{place}.attentions.{number}", ADDED_KEYS)
    for place, number in (("down_blocks.1", 0), ("mid_block", 0), ("up_blocks.0", 0), ("up_blocks.0", 1))
)

UNET_PICTURES = (
    Family("sd", sd, sd_inputs, SD_BLOCKS, slack=1e-5, visible=0.01),
    Family("sdxl", sdxl, sdxl_inputs, SDXL_BLOCKS, thin=(0, 3, 5, 7), slack=1e-5, visible=0.01),
    Family("kandinsky2", kandinsky, kandinsky_inputs, KANDINSKY_BLOCKS, no_text, slack=1e-5, visible=0.01),
)
