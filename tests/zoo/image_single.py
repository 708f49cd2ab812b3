"""Image transformers whose blocks have one stream: text by cross-attention, or packed into the stream."""

import copy
import dataclasses

import diffusers
import torch

from zoo import values
from zoo.family import HEAD_DIM, HEADS, TEXT, BlockKind, Family, numbered, prefix_mask, rows, timesteps

WIDTH = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM}


def plane(batch, seed, text="encoder_hidden_states"):
    return {"hidden_states": rows(batch, seed, 4, 8, 8), text: rows(batch, seed + 1, TEXT, 24)}


def pixart():
    return diffusers.PixArtTransformer2DModel(
        in_channels=4,
        out_channels=8,
        num_layers=4,
        cross_attention_dim=32,
        sample_size=8,
        caption_channels=24,
        use_additional_conditions=False,
        **WIDTH,
    )


def pixart_inputs(batch=2, seed=0):
    return {
        **plane(batch, seed),
        "timestep": timesteps(batch),
        "encoder_attention_mask": prefix_mask(batch, TEXT),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


CROSS_BLOCK = BlockKind(
    returns="h",
    projections={"attn": ("attn1.to_out.0",), "cross_attn": ("attn2.to_out.0",), "mlp": ("ff.net.2",)},
    values={"attn1": values.SelfValues},
)


def dit():
    return diffusers.DiTTransformer2DModel(
        in_channels=4, out_channels=8, num_layers=4, sample_size=8, num_embeds_ada_norm=12, **WIDTH
    )


def dit_inputs(batch=2, seed=0):
    return {
        "hidden_states": rows(batch, seed, 4, 8, 8),
        "timestep": timesteps(batch),
        "class_labels": torch.arange(batch) % 10,
    }


DIT_BLOCK = BlockKind(
    returns="h",
    projections={"attn": ("attn1.to_out.0",), "mlp": ("ff.net.2",)},
    values={"attn1": values.SelfValues},
)


class DiTFamily(Family):
    """The model reads an embedding out of its first block after the last one, so that block stays, without effect."""

    def identity_block(self, model, i):
        edited = copy.deepcopy(model)
        edited.transformer_blocks[i].forward = lambda hidden_states, **_: hidden_states
        return edited


# Sana: linear attention, a convolution as feed-forward


def sana(**config):
    return diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=4,
        num_cross_attention_heads=HEADS,
        cross_attention_head_dim=HEAD_DIM,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=8,
        **WIDTH,
        **config,
    )


def sana_inputs(batch=2, seed=0):
    return {
        **plane(batch, seed),
        "timestep": timesteps(batch),
        "encoder_attention_mask": prefix_mask(batch, TEXT),
    }


def sana_sprint():
    """Guidance-distilled, with norms of queries and keys."""
    return sana(guidance_embeds=True, qk_norm="rms_norm_across_heads")


def sana_sprint_inputs(batch=2, seed=0):
    return {**sana_inputs(batch, seed), "guidance": torch.full((batch,), 0.45)}


SANA_BLOCK = BlockKind(
    returns="h",
    projections={"attn": ("attn1.to_out.0",), "cross_attn": ("attn2.to_out.0",), "mlp": ("ff.conv_point",)},
)

# Hunyuan-DiT: the second half of the blocks reads what the first half returned. Six blocks: two long skips


def hunyuan_dit():
    return diffusers.HunyuanDiT2DModel(
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=32,
        num_layers=6,
        mlp_ratio=2.0,
        cross_attention_dim=24,
        cross_attention_dim_t5=24,
        pooled_projection_dim=12,
        text_len=TEXT,
        text_len_t5=4,
        learn_sigma=True,
        use_style_cond_and_image_meta_size=False,
        **WIDTH,
    )


def hunyuan_dit_inputs(batch=2, seed=0):
    angles = torch.rand(16, HEAD_DIM // 2, generator=torch.Generator().manual_seed(5)) * 6.28
    angles = angles.repeat_interleave(2, dim=1)
    return {
        **plane(batch, seed),
        "timestep": timesteps(batch),
        "text_embedding_mask": prefix_mask(batch, TEXT),
        "encoder_hidden_states_t5": rows(batch, seed + 2, 4, 24),
        "text_embedding_mask_t5": prefix_mask(batch, 4),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


# Lumina 2 and Z-Image: text and image are refined on their own before they are one sequence


def lumina2():
    return diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(20, 16, 16),
        cap_feat_dim=24,
    )


def lumina2_inputs(batch=2, seed=0):
    return {
        **plane(batch, seed),
        "timestep": timesteps(batch) / 1000,
        "encoder_attention_mask": prefix_mask(batch, TEXT).bool(),
    }


LUMINA2_BLOCK = BlockKind(returns="h", projections={"attn": ("attn.to_out.0",), "mlp": ("feed_forward.linear_2",)})


def zimage():
    return diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 6, 6],
        axes_lens=[96, 16, 16],
    )


def zimage_inputs(batch=2, seed=0):
    """Lists with one entry per row; 32 tokens of each kind after padding."""
    return {
        "x": list(rows(batch, seed, 4, 1, 8, 8)),
        "t": timesteps(batch) / 1000,
        "cap_feats": [text[: TEXT - i % 3] for i, text in enumerate(rows(batch, seed + 1, TEXT, 24))],
    }


ZIMAGE_BLOCK = BlockKind(returns="h", projections={"attn": ("attention.to_out.0",), "mlp": ("feed_forward.w2",)})
ZIMAGE_NOISE = BlockKind(ZIMAGE_BLOCK.returns, ZIMAGE_BLOCK.projections, {"attention": values.SelfValues})

# OmniGen: the prompt's tokens, the time and the image in one sequence


def omnigen():
    return diffusers.OmniGenTransformer2DModel(
        in_channels=4,
        hidden_size=32,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=48,
        num_layers=4,
        pad_token_id=0,
        vocab_size=40,
        max_position_embeddings=64,
        original_max_position_embeddings=64,
        rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
        pos_embed_max_size=8,
        time_step_dim=16,
    )


def omnigen_inputs(batch=2, seed=0):
    length = TEXT + 1 + 16
    return {
        "hidden_states": rows(batch, seed, 4, 8, 8),
        "timestep": timesteps(batch) / 1000,
        "input_ids": (rows(batch, seed + 1, TEXT).abs() * 10).long() % 40,
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(batch, length, length).tril(),
        "position_ids": torch.arange(length).expand(batch, -1),
    }


OMNIGEN_BLOCK = BlockKind(returns="h", projections={"attn": ("self_attn.to_out.0",), "mlp": ("mlp.down_proj",)})

# PRX: the text is in the attention, and no block changes it; the feed-forward's layers are the block's own


def prx():
    return diffusers.PRXTransformer2DModel(
        in_channels=4, context_in_dim=24, hidden_size=32, mlp_ratio=2.0, num_heads=HEADS, depth=4, axes_dim=[8, 8]
    )


def prx_inputs(batch=2, seed=0):
    return {
        **plane(batch, seed),
        "timestep": timesteps(batch) / 1000,
        "attention_mask": prefix_mask(batch, TEXT).bool(),
    }


PRX_BLOCK = BlockKind(returns="h", projections={"attn": ("attention.to_out.0",), "mlp": ("down_proj",)})

# Krea 2: packed text and image, fewer keys than queries


def krea2():
    return diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=4,
        num_key_value_heads=1,
        intermediate_size=48,
        timestep_embed_dim=16,
        text_hidden_dim=24,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
        **WIDTH,
    )


def krea2_inputs(batch=2, seed=0):
    y, x = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    image = torch.stack([torch.zeros_like(x), y, x], dim=-1).flatten(0, 1)
    return {
        "hidden_states": rows(batch, seed, 16, 16),
        "encoder_hidden_states": rows(batch, seed + 1, TEXT, 2, 24),
        "timestep": timesteps(batch) / 1000,
        "position_ids": torch.cat([torch.zeros(TEXT, 3), image.float()]),
        "encoder_attention_mask": prefix_mask(batch, TEXT).bool(),
    }


KREA2_BLOCK = BlockKind(returns="h", projections={"attn": ("attn.to_out.0",), "mlp": ("ff.down",)})

_FAMILIES = (
    Family("pixart", pixart, pixart_inputs, numbered({"transformer_blocks": (4, CROSS_BLOCK)})),
    DiTFamily("dit", dit, dit_inputs, numbered({"transformer_blocks": (4, DIT_BLOCK)})),
    Family("sana", sana, sana_inputs, numbered({"transformer_blocks": (4, SANA_BLOCK)}), visible=0.005),
    Family(
        "sana_sprint", sana_sprint, sana_sprint_inputs, numbered({"transformer_blocks": (4, SANA_BLOCK)}), visible=0.005
    ),
    Family("hunyuan_dit", hunyuan_dit, hunyuan_dit_inputs, numbered({"blocks": (6, CROSS_BLOCK)}), std=0.12),
    Family(
        "lumina2",
        lumina2,
        lumina2_inputs,
        numbered(
            {
                "context_refiner": (1, LUMINA2_BLOCK),
                "noise_refiner": (1, LUMINA2_BLOCK),
                "layers": (3, LUMINA2_BLOCK),
            }
        ),
    ),
    Family(
        "zimage",
        zimage,
        zimage_inputs,
        numbered(
            {
                "noise_refiner": (1, ZIMAGE_NOISE),
                "context_refiner": (1, ZIMAGE_BLOCK),
                "layers": (3, ZIMAGE_BLOCK),
            }
        ),
        slack=3e-5,  # predictions of size 3, attention with and without a mask
    ),
    Family("omnigen", omnigen, omnigen_inputs, numbered({"layers": (4, OMNIGEN_BLOCK)})),
    Family("prx", prx, prx_inputs, numbered({"blocks": (4, PRX_BLOCK)})),
    Family("krea2", krea2, krea2_inputs, numbered({"transformer_blocks": (4, KREA2_BLOCK)})),
)
IMAGE_SINGLE = tuple(dataclasses.replace(family, thin=True) for family in _FAMILIES)
