"""The families with one stream and cross-attention to the text: LTX-Video, Wan, Latte."""

import diffusers

from zoo import values
from zoo.family import HEAD_DIM, HEADS, TEXT, BlockKind, Family, numbered, prefix_mask, rows, timesteps


def ltx():
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=32,
        num_layers=4,
        caption_channels=24,
    )


def ltx_inputs(batch=2, seed=0):
    return {
        "hidden_states": rows(batch, seed, 2 * 3 * 3, 8),
        "encoder_hidden_states": rows(batch, seed + 1, TEXT, 24),
        "timestep": timesteps(batch),
        "encoder_attention_mask": prefix_mask(batch, TEXT),
        "num_frames": 2,
        "height": 3,
        "width": 3,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


LTX_BLOCK = BlockKind(
    returns="h",
    projections={"attn": ("attn1.to_out.0",), "cross_attn": ("attn2.to_out.0",), "mlp": ("ff.net.2",)},
    values={"attn1": values.SelfValues},
)


# Wan: text to video, and image to video with image tokens in the cross-attention


def wan(**config):
    return diffusers.WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        out_channels=4,
        text_dim=24,
        freq_dim=32,
        ffn_dim=48,
        num_layers=4,
        rope_max_seq_len=32,
        **{"in_channels": 4, **config},
    )


def wan_inputs(batch=2, seed=0, channels=4, text=TEXT):
    return {
        "hidden_states": rows(batch, seed, channels, 2, 6, 6),
        "timestep": timesteps(batch),
        "encoder_hidden_states": rows(batch, seed + 1, text, 24),
    }


def wan_i2v():
    return wan(in_channels=12, image_dim=20, added_kv_proj_dim=32)


def wan_i2v_inputs(batch=2, seed=0):
    """512 text tokens, because the attention processor counts the image tokens as what is beyond 512."""
    inputs = wan_inputs(batch, seed, channels=12, text=512)
    return {**inputs, "encoder_hidden_states_image": rows(batch, seed + 2, 5, 20)}


WAN_BLOCK = BlockKind(
    returns="h",
    projections={"attn": ("attn1.to_out.0",), "cross_attn": ("attn2.to_out.0",), "mlp": ("ffn.net.2",)},
    values={"attn1": values.SelfValues},
)


# Latte: spatial blocks on [B*F, N, D] and temporal blocks on [B*N, F, D], interleaved


def latte():
    return diffusers.LatteTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=32,
        attention_bias=True,
        sample_size=6,
        patch_size=2,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=24,
        video_length=3,
    )


def latte_inputs(batch=2, seed=0):
    return {
        "hidden_states": rows(batch, seed, 4, 3, 6, 6),
        "timestep": timesteps(batch),
        "encoder_hidden_states": rows(batch, seed + 1, TEXT, 24),
    }


LATTE_SPATIAL = LTX_BLOCK
LATTE_TEMPORAL = BlockKind(
    returns="h",
    projections={"attn": ("attn1.to_out.0",), "mlp": ("ff.net.2",)},
    values={"attn1": values.SelfValues},
)
LATTE_STACKS = (("transformer_blocks", LATTE_SPATIAL), ("temporal_transformer_blocks", LATTE_TEMPORAL))

ONE_STREAM = (
    Family("ltx", ltx, ltx_inputs, numbered({"transformer_blocks": (4, LTX_BLOCK)})),
    Family("wan", wan, wan_inputs, numbered({"blocks": (4, WAN_BLOCK)})),
    Family("wan_i2v", wan_i2v, wan_i2v_inputs, numbered({"blocks": (4, WAN_BLOCK)})),
    Family(
        "latte",
        latte,
        latte_inputs,
        tuple((f"{stack}.{i}", kind) for i in range(3) for stack, kind in LATTE_STACKS),
    ),
)
