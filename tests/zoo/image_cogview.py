"""The CogView family: a joint attention over text and image, told the picture's size and crop."""

import diffusers
import torch

from zoo import image_values, values
from zoo.family import HEAD_DIM, HEADS, TEXT, BlockKind, Family, numbered, prefix_mask, rows, timesteps

SIZES = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "num_layers": 4}
SIZES |= {"in_channels": 4, "out_channels": 4, "text_embed_dim": 24, "time_embed_dim": 16, "condition_dim": 8}


def picture(batch):
    return {
        "original_size": torch.full((batch, 2), 64.0),
        "target_size": torch.full((batch, 2), 64.0),
        "crop_coords": torch.zeros(batch, 2),
    }


def cogview3():
    return diffusers.CogView3PlusTransformer2DModel(
        pos_embed_max_size=8,
        sample_size=8,
        **SIZES,
    )


def cogview4():
    return diffusers.CogView4Transformer2DModel(
        pos_embed_max_size=8,
        sample_size=8,
        rope_axes_dim=(8, 8),
        **SIZES,
    )


def cogview3_inputs(batch=2, seed=0):
    return {
        "hidden_states": rows(batch, seed, 4, 8, 8),
        "encoder_hidden_states": rows(batch, seed + 1, TEXT, 24),
        "timestep": timesteps(batch),
        **picture(batch),
    }


def cogview4_inputs(batch=2, seed=0):
    return {**cogview3_inputs(batch, seed), "attention_mask": prefix_mask(batch, TEXT)}


def glm_image():
    return diffusers.GlmImageTransformer2DModel(
        prior_vq_quantizer_codebook_size=32,
        **SIZES,
    )


def glm_image_inputs(batch=2, seed=0):
    inputs = cogview4_inputs(batch, seed)
    del inputs["original_size"]
    return {
        **inputs,
        "prior_token_id": torch.arange(16).expand(batch, -1),
        "prior_token_drop": torch.zeros(batch, 16, dtype=torch.bool),
    }


def cogview(attention):
    return BlockKind(
        returns="he",
        projections={"attn": ("attn1.to_out.0",), "mlp": ("ff.net.2",)},
        values={"attn1": attention},
    )


IMAGE_COGVIEW = (
    Family(
        "cogview3", cogview3, cogview3_inputs, numbered({"transformer_blocks": (4, cogview(values.CogVideoXValues))})
    ),
    Family(
        "cogview4",
        cogview4,
        cogview4_inputs,
        numbered({"transformer_blocks": (4, cogview(image_values.CogView4Values))}),
    ),
    Family(
        "glm_image",
        glm_image,
        glm_image_inputs,
        numbered({"transformer_blocks": (4, cogview(image_values.CogView4Values))}),
    ),
)
