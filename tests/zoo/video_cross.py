"""More of one stream with cross-attention to the text: Allegro, Cosmos 1 and 2.5, Sana-Video, Kandinsky 5."""

import diffusers
import torch

from zoo.family import HEAD_DIM, HEADS, TEXT, BlockKind, Family, numbered, prefix_mask, rows, timesteps
from zoo.one_stream import LTX_BLOCK
from zoo.video_av import KandinskyValues


def allegro():
    return diffusers.AllegroTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        cross_attention_dim=48,
        sample_height=6,
        sample_width=6,
        sample_frames=2,
        caption_channels=24,
    )


def text_to_video_inputs(batch=2, seed=0):
    return {
        "hidden_states": rows(batch, seed, 4, 2, 6, 6),
        "timestep": timesteps(batch),
        "encoder_hidden_states": rows(batch, seed + 1, TEXT, 24),
        "encoder_attention_mask": prefix_mask(batch, TEXT),
    }


# Cosmos: 1 and 2 alike; 2.5 has a time per frame, a mask of given frames and image context


def cosmos(**config):
    return diffusers.CosmosTransformer3DModel(
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=3,
        mlp_ratio=2,
        text_embed_dim=24,
        adaln_lora_dim=4,
        max_size=(4, 8, 8),
        patch_size=(1, 2, 2),
        **{"in_channels": 4, **config},
    )


def cosmos_inputs(batch=2, seed=0):
    video = text_to_video_inputs(batch, seed)
    del video["encoder_attention_mask"]
    return {**video, "fps": 30, "padding_mask": torch.zeros(1, 1, 6, 6)}


def cosmos25():
    return cosmos(
        in_channels=5,
        extra_pos_embed_type=None,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=20,
        encoder_hidden_states_channels=24,
        img_context_dim_in=12,
        img_context_num_tokens=3,
        img_context_dim_out=32,
    )


def cosmos25_inputs(batch=2, seed=0):
    times = timesteps(batch)[:, None] * torch.tensor([0.01, 1.0])
    return {
        **cosmos_inputs(batch, seed),
        "timestep": times[:, None, :, None, None],
        "encoder_hidden_states": (rows(batch, seed + 1, TEXT, 20), rows(batch, seed + 2, 3, 12)),
        "condition_mask": rows(batch, seed + 3, 1, 2, 6, 6),
    }


# Sana-Video: linear self-attention, a feed-forward of convolutions


def sana_video():
    return diffusers.SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=3,
        num_cross_attention_heads=HEADS,
        cross_attention_head_dim=HEAD_DIM,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=6,
    )


SANA_BLOCK = BlockKind(
    returns="h",
    projections={"attn": ("attn1.to_out.0",), "cross_attn": ("attn2.to_out.0",), "mlp": ("ff.conv_point",)},
)


# Kandinsky 5: text blocks first; their last text goes into every video block


def kandinsky5(**config):
    return diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=24,
        in_text_dim2=12,
        time_dim=16,
        out_visual_dim=4,
        model_dim=32,
        ff_dim=48,
        num_text_blocks=2,
        num_visual_blocks=3,
        axes_dims=(4, 6, 6),
        **config,
    )


def kandinsky5_inputs(batch=2, seed=0):
    return {
        "hidden_states": rows(batch, seed, 2, 6, 6, 4),
        "encoder_hidden_states": rows(batch, seed + 1, TEXT, 24),
        "timestep": timesteps(batch),
        "pooled_projections": rows(batch, seed + 2, 12),
        "visual_rope_pos": [torch.arange(2), torch.arange(3), torch.arange(3)],
        "text_rope_pos": torch.arange(TEXT),
    }


KANDINSKY5_TEXT = BlockKind(
    returns="h",
    projections={"attn": ("self_attention.out_layer",), "mlp": ("feed_forward.out_layer",)},
    values={"self_attention": KandinskyValues},
)
KANDINSKY5_BLOCK = BlockKind(
    returns="h",
    projections={**KANDINSKY5_TEXT.projections, "cross_attn": ("cross_attention.out_layer",)},
    values=KANDINSKY5_TEXT.values,
)
KANDINSKY5_STACKS = {
    "text_transformer_blocks": (2, KANDINSKY5_TEXT),
    "visual_transformer_blocks": (3, KANDINSKY5_BLOCK),
}


def family(name, make, call, kind=LTX_BLOCK, std=0.15):
    blocks = numbered({"transformer_blocks": (3, kind)})
    return Family(name, make, call, blocks, text_length=lambda _: TEXT, std=std, thin=True)


VIDEO_CROSS = (
    family("allegro", allegro, text_to_video_inputs),
    family("cosmos", cosmos, cosmos_inputs),
    family("cosmos25", cosmos25, cosmos25_inputs),
    family("sana_video", sana_video, text_to_video_inputs, SANA_BLOCK, std=0.2),
    # this model rounds rotated queries and keys to bfloat16
    Family("kandinsky5", kandinsky5, kandinsky5_inputs, numbered(KANDINSKY5_STACKS), thin=True, slack=1e-3),
)
