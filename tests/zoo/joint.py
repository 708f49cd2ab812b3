"""The families with a joint attention: CogVideoX, Mochi, HunyuanVideo, HunyuanVideo 1.5, SD3, Flux."""

import dataclasses

import diffusers
import torch

from zoo import values
from zoo.family import HEAD_DIM, HEADS, TEXT, BlockKind, Family, numbered, prefix_mask, rows, timesteps

# CogVideoX: two streams, one set of projections and one feed-forward for both


def cogvideox():
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=4,
        time_embed_dim=24,
        text_embed_dim=24,
        num_layers=4,
        attention_bias=True,
        sample_width=6,
        sample_height=6,
        sample_frames=5,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    )


def cogvideox_inputs(batch=2, seed=0):
    angles = torch.rand(2 * 3 * 3, HEAD_DIM // 2, generator=torch.Generator().manual_seed(5)) * 6.28
    angles = angles.repeat_interleave(2, dim=1)
    return {
        "hidden_states": rows(batch, seed, 2, 4, 6, 6),
        "encoder_hidden_states": rows(batch, seed + 1, TEXT, 24),
        "timestep": timesteps(batch),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


COG_BLOCK = BlockKind(
    returns="he",
    projections={"attn": ("attn1.to_out.0",), "mlp": ("ff.net.2",)},
    values={"attn1": values.CogVideoXValues},
)


# Mochi: two streams of different width; the last block has no text output


def mochi():
    return diffusers.MochiTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=4,
        pooled_projection_dim=24,
        in_channels=4,
        text_embed_dim=24,
        time_embed_dim=16,
        max_sequence_length=TEXT,
    )


def mochi_inputs(batch=2, seed=0):
    return {
        "hidden_states": rows(batch, seed, 4, 2, 6, 6),
        "encoder_hidden_states": rows(batch, seed + 1, TEXT, 24),
        "timestep": timesteps(batch),
        "encoder_attention_mask": prefix_mask(batch, TEXT),
    }


MOCHI_BLOCK = BlockKind(
    returns="he",
    projections={"attn": ("attn1.to_out.0", "attn1.to_add_out"), "mlp": ("ff.net.2", "ff_context.net.2")},
    values={"attn1": values.MochiValues},
)


# HunyuanVideo: dual blocks, then single blocks in which attention and feed-forward share one projection


def hunyuan():
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=3,
        num_single_layers=3,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=24,
        pooled_projection_dim=12,
        rope_axes_dim=(4, 6, 6),
    )


def hunyuan_inputs(batch=2, seed=0):
    return {
        "hidden_states": rows(batch, seed, 4, 2, 6, 6),
        "timestep": timesteps(batch),
        "encoder_hidden_states": rows(batch, seed + 1, TEXT, 24),
        "encoder_attention_mask": prefix_mask(batch, TEXT),
        "pooled_projections": rows(batch, seed + 2, 12),
        "guidance": torch.full((batch,), 6000.0),
    }


def dual(attention: type[values.Values], returns: str = "he") -> BlockKind:
    return BlockKind(
        returns=returns,
        projections={"attn": ("attn.to_out.0", "attn.to_add_out"), "mlp": ("ff.net.2", "ff_context.net.2")},
        values={"attn": attention},
    )


def single(attention: type[values.Values], returns: str = "he") -> BlockKind:
    return BlockKind(
        returns=returns,
        projections={"attn": ("proj_out:attn",), "mlp": ("proj_out:mlp",)},
        values={"attn": attention},
    )


# HunyuanVideo 1.5: dual blocks only, image tokens, two text encoders


def hunyuan15():
    return diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=4,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=1,
        text_embed_dim=24,
        text_embed_2_dim=12,
        image_embed_dim=20,
        rope_axes_dim=(4, 6, 6),
        target_size=48,
        task_type="t2v",
    )


def hunyuan15_inputs(batch=2, seed=0):
    return {
        "hidden_states": rows(batch, seed, 9, 2, 3, 3),
        "timestep": timesteps(batch),
        "encoder_hidden_states": rows(batch, seed + 1, TEXT, 24),
        "encoder_attention_mask": prefix_mask(batch, TEXT),
        "encoder_hidden_states_2": rows(batch, seed + 2, 4, 12),
        "encoder_attention_mask_2": prefix_mask(batch, 4),
        "image_embeds": torch.zeros(batch, 3, 20),
    }


# SD3 and SD3.5: two streams; 3.5 has a second attention, of the image alone, in some blocks


def sd3(**config):
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=4,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=12,
        out_channels=4,
        pos_embed_max_size=8,
        **config,
    )


def sd35():
    return sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm")


def sd3_inputs(batch=2, seed=0):
    return {
        "hidden_states": rows(batch, seed, 4, 8, 8),
        "encoder_hidden_states": rows(batch, seed + 1, TEXT, 24),
        "pooled_projections": rows(batch, seed + 2, 12),
        "timestep": timesteps(batch),
    }


SD3_BLOCK = dual(values.SD3Values, "eh")
SD35_DUAL = dataclasses.replace(
    SD3_BLOCK,
    projections={**SD3_BLOCK.projections, "attn": ("attn.to_out.0", "attn.to_add_out", "attn2.to_out.0")},
    values={"attn": values.SD3Values, "attn2": values.SelfValues},
)


# Flux: dual then single blocks, text first everywhere, (text, image) returned


def flux():
    return diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=3,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def flux_inputs(batch=2, seed=0):
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    return {
        "hidden_states": rows(batch, seed, 16, 16),
        "encoder_hidden_states": rows(batch, seed + 1, TEXT, 24),
        "pooled_projections": rows(batch, seed + 2, 12),
        "timestep": timesteps(batch) / 1000,
        "img_ids": torch.stack([torch.zeros(16), y.flatten(), x.flatten()], dim=-1),
        "txt_ids": torch.zeros(TEXT, 3),
        "guidance": torch.full((batch,), 3.5),
    }


def dual_then_single(returns: str, dual_values: type[values.Values], single_values: type[values.Values]):
    kinds = {
        "transformer_blocks": (3, dual(dual_values, returns)),
        "single_transformer_blocks": (3, single(single_values, returns)),
    }
    return numbered(kinds)


JOINT = (
    Family("cogvideox", cogvideox, cogvideox_inputs, numbered({"transformer_blocks": (4, COG_BLOCK)})),
    Family("mochi", mochi, mochi_inputs, numbered({"transformer_blocks": (4, MOCHI_BLOCK)})),
    Family(
        "hunyuan",
        hunyuan,
        hunyuan_inputs,
        dual_then_single("he", values.HunyuanValues, values.HunyuanValues),
    ),
    Family(
        "hunyuan15",
        hunyuan15,
        hunyuan15_inputs,
        numbered({"transformer_blocks": (4, dual(values.Hunyuan15Values))}),
    ),
    Family("sd3", sd3, sd3_inputs, numbered({"transformer_blocks": (4, SD3_BLOCK)})),
    Family(
        "sd35",
        sd35,
        sd3_inputs,
        tuple((f"transformer_blocks.{i}", SD35_DUAL if i < 2 else SD3_BLOCK) for i in range(4)),
    ),
    Family("flux", flux, flux_inputs, dual_then_single("eh", values.FluxValues, values.FluxSingleValues)),
)
