"""Wan's relatives: VACE, Animate, SkyReels-V2 (also with diffusion forcing), ChronoEdit, AnyFlow, Helios."""

import diffusers
import torch
from torch import nn

from zoo import values
from zoo.family import HEAD_DIM, HEADS, TEXT, BlockKind, Family, numbered, rows, timesteps
from zoo.one_stream import WAN_BLOCK


def wan_like(cls: str, layers: int = 3, **config):
    return getattr(diffusers, cls)(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        out_channels=4,
        text_dim=24,
        freq_dim=32,
        ffn_dim=48,
        num_layers=layers,
        **{"in_channels": 4, **config},
    )


def inputs(batch=2, seed=0, channels=4, frames=2, side=6):
    return {
        "hidden_states": rows(batch, seed, channels, frames, side, side),
        "timestep": timesteps(batch),
        "encoder_hidden_states": rows(batch, seed + 1, TEXT, 24),
    }


# VACE: control blocks run first and give hints, which the model adds behind some of the video blocks


class NoHint(nn.Module):
    """A control block that is left out: its hint is zero, the control stream goes on as it came."""

    def forward(self, hidden_states, encoder_hidden_states, control_hidden_states, temb, rotary_emb):
        return torch.zeros_like(hidden_states), control_hidden_states


VACE_BLOCK = BlockKind("", WAN_BLOCK.projections, WAN_BLOCK.values, NoHint)


def vace():
    return wan_like("WanVACETransformer3DModel", rope_max_seq_len=32, vace_layers=[0, 2], vace_in_channels=6)


def vace_inputs(batch=2, seed=0):
    control = rows(batch, seed + 2, 6, 2, 6, 6)
    scale = torch.tensor([1.0, 0.7])
    return {**inputs(batch, seed), "control_hidden_states": control, "control_hidden_states_scale": scale}


# Animate: a face adapter between some blocks


def animate(**config):
    return wan_like(
        "WanAnimateTransformer3DModel",
        layers=4,
        in_channels=12,
        latent_channels=4,
        rope_max_seq_len=32,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
        **{"image_dim": None, **config},
    )


def animate_inputs(batch=2, seed=0):
    return {
        **inputs(batch, seed, channels=12, frames=3),
        "pose_hidden_states": rows(batch, seed + 2, 4, 2, 6, 6),
        "face_pixel_values": rows(batch, seed + 3, 3, 5, 16, 16),
    }


def skyreels(**config):
    return wan_like("SkyReelsV2Transformer3DModel", rope_max_seq_len=32, **config)


def skyreels_df():
    return skyreels(num_frame_per_block=2)


def skyreels_df_inputs(batch=2, seed=0):
    """Diffusion forcing: every frame has its own time."""
    times = timesteps(batch)[:, None] - 100.0 * torch.arange(4)
    return {**inputs(batch, seed, frames=4), "timestep": times, "enable_diffusion_forcing": True}


def chronoedit():
    return wan_like("ChronoEditTransformer3DModel", rope_max_seq_len=32)


def anyflow():
    return wan_like("AnyFlowTransformer3DModel", rope_max_seq_len=32)


def anyflow_inputs(batch=2, seed=0):
    """Frames before channels; a time to come from and one to go to, per frame."""
    times = timesteps(batch)[:, None].expand(batch, 2)
    video = rows(batch, seed, 2, 4, 6, 6)
    return {**inputs(batch, seed), "hidden_states": video, "timestep": times, "r_timestep": times - 100}


# Helios: the video's past stands before it in the sequence, coarser the older it is


def helios():
    return wan_like("HeliosTransformer3DModel", rope_dim=(4, 6, 6))


def helios_inputs(batch=2, seed=0):
    def frames(start, stop):
        return torch.arange(start, stop)[None].expand(batch, -1)

    return {
        **inputs(batch, seed, side=4),
        "indices_hidden_states": frames(8, 10),
        "indices_latents_history_short": frames(6, 8),
        "indices_latents_history_mid": frames(4, 6),
        "indices_latents_history_long": frames(0, 4),
        "latents_history_short": rows(batch, seed + 2, 4, 2, 4, 4),
        "latents_history_mid": rows(batch, seed + 3, 4, 2, 4, 4),
        "latents_history_long": rows(batch, seed + 4, 4, 4, 4, 4),
    }


HELIOS_BLOCK = BlockKind("h", WAN_BLOCK.projections, {"attn1": values.SelfValues})


def family(name, make, call, layers=3, kind=WAN_BLOCK):
    return Family(name, make, call, numbered({"blocks": (layers, kind)}), thin=True)


VIDEO_WAN = (
    Family(
        "wan_vace",
        vace,
        vace_inputs,
        numbered({"vace_blocks": (2, VACE_BLOCK), "blocks": (3, WAN_BLOCK)}),
        thin=True,
    ),
    family("wan_animate", animate, animate_inputs, layers=4),
    family("skyreels", skyreels, inputs),
    family("skyreels_df", skyreels_df, skyreels_df_inputs),
    family("chronoedit", chronoedit, inputs),
    family("anyflow", anyflow, anyflow_inputs),
    family("helios", helios, helios_inputs, kind=HELIOS_BLOCK),
)
