"""Video and sound together: LTX-2 (also with a gate per head), Kandinsky 6, MiniMax H3."""

import diffusers
import torch
from torch import nn

from zoo import values
from zoo.family import HEAD_DIM, HEADS, TEXT, BlockKind, Family, numbered, prefix_mask, rows, timesteps

# LTX-2: a video and an audio stream of different widths, arguments by name


class BothPass(nn.Module):
    """A block that is left out."""

    def forward(self, hidden_states, audio_hidden_states, **kwargs):
        return hidden_states, audio_hidden_states


def ltx2(**config):
    return diffusers.LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=32,
        audio_in_channels=8,
        audio_out_channels=8,
        audio_num_attention_heads=HEADS,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=3,
        caption_channels=24,
        **config,
    )


def ltx2_gated():
    """As LTX-2.3: gated heads, modulated texts, attention that the pipeline can perturb."""
    gates = {"gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True, "audio_cross_attn_mod": True}
    return ltx2(**gates, perturbed_attn=True)


def ltx2_inputs(batch=2, seed=0):
    return {
        "hidden_states": rows(batch, seed, 2 * 3 * 3, 8),
        "audio_hidden_states": rows(batch, seed + 1, 5, 8),
        "encoder_hidden_states": rows(batch, seed + 2, TEXT, 24),
        "audio_encoder_hidden_states": rows(batch, seed + 3, TEXT, 24),
        "timestep": timesteps(batch),
        "sigma": timesteps(batch) / 1000,
        "encoder_attention_mask": prefix_mask(batch, TEXT),
        "audio_encoder_attention_mask": prefix_mask(batch, TEXT),
        "num_frames": 2,
        "height": 3,
        "width": 3,
        "audio_num_frames": 5,
    }


class GatedValues(values.Values):
    """The values of every head times its gate."""

    def forward(self, hidden_states, *args, **kwargs):
        a = self.attn
        heads = a.to_v(hidden_states).unflatten(2, (a.heads, -1))
        gates = 2 / (1 + torch.exp(-a.to_gate_logits(hidden_states)))
        return a.to_out[0]((heads * gates.unsqueeze(-1)).flatten(2))


def ltx2_block(attention):
    return BlockKind(
        returns="",
        projections={
            "attn": ("attn1.to_out.0", "audio_attn1.to_out.0"),
            "cross_attn": (
                "attn2.to_out.0",
                "audio_attn2.to_out.0",
                "audio_to_video_attn.to_out.0",
                "video_to_audio_attn.to_out.0",
            ),
            "mlp": ("ff.net.2", "audio_ff.net.2"),
        },
        values={"attn1": attention, "audio_attn1": attention},
        identity=BothPass,
    )


# Kandinsky 6: two streams, each with its own refined text; (video, audio) positional


def kandinsky6():
    return diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=24,
        in_text_dim2=12,
        time_dim=16,
        model_dim=32,
        ff_dim=48,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        visual_cond=False,
        in_audio_dim=5,
        out_audio_dim=5,
    )


def kandinsky6_inputs(batch=2, seed=0):
    return {
        "hidden_states": rows(batch, seed, 2, 6, 6, 4),
        "encoder_hidden_states": rows(batch, seed + 1, TEXT, 24),
        "timestep": timesteps(batch),
        "pooled_projections": rows(batch, seed + 2, 12),
        "audio_hidden_states": rows(batch, seed + 3, 4, 5),
    }


class KandinskyValues(values.Values):
    """Kandinsky's names for the same."""

    def forward(self, hidden_states, *args, **kwargs):
        return self.attn.out_layer(self.attn.to_value(hidden_states))


KANDINSKY6_TEXT = BlockKind(
    "h", {"attn": ("attn.out_layer",), "mlp": ("feed_forward.net.2",)}, {"attn": KandinskyValues}
)
KANDINSKY6_BLOCK = BlockKind(
    returns="he",
    projections={
        "attn": ("video_dec_block.self_attention.out_layer", "audio_dec_block.self_attention.out_layer"),
        "cross_attn": (
            "video_dec_block.cross_attention.out_layer",
            "audio_dec_block.cross_attention.out_layer",
            "va_cross_attention.out_layer",
            "av_cross_attention.out_layer",
        ),
        "mlp": ("video_dec_block.feed_forward.net.2", "audio_dec_block.feed_forward.net.2"),
    },
    values={
        "video_dec_block.self_attention": KandinskyValues,
        "audio_dec_block.self_attention": KandinskyValues,
    },
)


# MiniMax H3: one sequence of text, video and audio; what says where a token belongs has no batch dimension


def minimax_h3():
    return diffusers.MiniMaxH3Transformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        hidden_size=32,
        num_layers=3,
        num_refiner_layers=1,
        ffn_dim=48,
        in_channels=4,
        audio_in_channels=5,
        text_dim=24,
        freq_dim=16,
        time_embed_hidden_dim=24,
        time_embed_dim=16,
        rope_freq_dim=2,
    )


def minimax_h3_inputs(batch=2, seed=0):
    video, audio = 8, 3
    length = TEXT + video + audio
    place = torch.arange(length)
    tags = torch.cat([torch.full((n,), tag) for tag, n in enumerate((TEXT, video, audio))])
    return {
        "hidden_states": rows(batch, seed, video, 16),
        "audio_hidden_states": rows(batch, seed + 1, audio, 5),
        "encoder_hidden_states": rows(batch, seed + 2, TEXT, 24),
        "timestep": torch.tensor([0.0, 700.0]),
        "timestep_indices": (tags > 0).long(),
        "token_tags": tags,
        "position_ids": torch.stack([place, place % 2, place % 3], dim=1),
        "text_indices": place[:TEXT],
        "video_indices": place[TEXT : TEXT + video],
        "audio_indices": place[TEXT + video :],
    }


MINIMAX_BLOCK = BlockKind("h", {"attn": ("attn.to_out.0",), "mlp": ("ff.net.2",)}, {"attn": values.SelfValues})

LTX2_STACK = {"transformer_blocks": (3, ltx2_block(values.SelfValues))}
GATED_STACK = {"transformer_blocks": (3, ltx2_block(GatedValues))}

VIDEO_AUDIO: tuple[Family, ...] = (
    Family("ltx2", ltx2, ltx2_inputs, numbered(LTX2_STACK), thin=True),
    Family("ltx2_gated", ltx2_gated, ltx2_inputs, numbered(GATED_STACK), thin=True),
    Family(
        "kandinsky6",
        kandinsky6,
        kandinsky6_inputs,
        numbered(
            {
                "video_text_transformer_blocks": (1, KANDINSKY6_TEXT),
                "audio_text_transformer_blocks": (1, KANDINSKY6_TEXT),
                "visual_transformer_blocks": (2, KANDINSKY6_BLOCK),
            }
        ),
        std=0.2,
        thin=True,
    ),
    Family(
        "minimax_h3",
        minimax_h3,
        minimax_h3_inputs,
        numbered({"transformer_blocks": (3, MINIMAX_BLOCK)}),
        thin=True,
    ),
)
if not hasattr(diffusers, "Kandinsky6Transformer3DModel"):  # older than 0.42
    VIDEO_AUDIO = tuple(family for family in VIDEO_AUDIO if family.name != "kandinsky6")
