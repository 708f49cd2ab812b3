"""More joint attention: HunyuanVideo I2V and Framepack, ConsisID, EasyAnimate, Motif-Video."""

import diffusers
import torch

from zoo import values
from zoo.family import HEAD_DIM, HEADS, TEXT, BlockKind, Family, numbered, prefix_mask, rows, timesteps
from zoo.joint import COG_BLOCK, cogvideox_inputs, dual, hunyuan_inputs, single


def hunyuan_like(cls: str, **config):
    return getattr(diffusers, cls)(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=24,
        pooled_projection_dim=12,
        rope_axes_dim=(4, 6, 6),
        **config,
    )


def hunyuan_i2v():
    """The first frame is the picture, with a modulation of its own."""
    return hunyuan_like("HunyuanVideoTransformer3DModel", image_condition_type="token_replace")


def framepack():
    sizes = {"has_image_proj": True, "image_proj_dim": 20, "has_clean_x_embedder": True}
    return hunyuan_like("HunyuanVideoFramepackTransformer3DModel", **sizes)


def framepack_inputs(batch=2, seed=0):
    """No text is masked: for a batch of one, this model cuts masked text off instead."""
    past = {"clean": (1, 6, 7), "history_2x": (2, 4, 6), "history_4x": (4, 0, 4)}
    history = {f"latents_{name}": rows(batch, seed + 5, 4, n, 4, 4) for name, (n, _, _) in past.items()}
    indices = {f"indices_latents_{name}": torch.arange(a, b) for name, (_, a, b) in past.items()}
    return {
        **hunyuan_inputs(batch, seed),
        "hidden_states": rows(batch, seed, 4, 2, 4, 4),
        "encoder_attention_mask": torch.ones(batch, TEXT, dtype=torch.long),
        "image_embeds": rows(batch, seed + 3, 3, 20),
        "indices_latents": torch.arange(7, 9),
        **history,
        **indices,
    }


HUNYUAN_STACKS = {
    "transformer_blocks": (2, dual(values.HunyuanValues)),
    "single_transformer_blocks": (2, single(values.HunyuanValues)),
}


# ConsisID: CogVideoX with attention to a face between some blocks


def consisid():
    return diffusers.ConsisIDTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        time_embed_dim=24,
        text_embed_dim=24,
        num_layers=4,
        sample_width=6,
        sample_height=6,
        sample_frames=5,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_interval=2,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=8,
        LFE_vit_dim=8,
        LFE_depth=2,
        LFE_dim_head=4,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=3,
        LFE_output_dim=32,
        LFE_ff_mult=1,
        LFE_num_scale=2,
    )


def consisid_inputs(batch=2, seed=0):
    angles = torch.rand(2 * 3 * 3, 12, generator=torch.Generator().manual_seed(5)) * 6.28
    angles = angles.repeat_interleave(2, dim=1)
    return {
        **cogvideox_inputs(batch, seed),
        "image_rotary_emb": (angles.cos(), angles.sin()),
        "id_cond": rows(batch, seed + 2, 8),
        "id_vit_hidden": [rows(batch, seed + 3, 3, 8), rows(batch, seed + 4, 3, 8)],
    }


# EasyAnimate: [text, video]


def easyanimate():
    return diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        sample_width=6,
        sample_height=6,
        num_layers=3,
        mmdit_layers=3,
        time_embed_dim=24,
        text_embed_dim=24,
    )


def easyanimate_inputs(batch=2, seed=0):
    return {
        "hidden_states": rows(batch, seed, 4, 2, 6, 6),
        "timestep": timesteps(batch),
        "encoder_hidden_states": rows(batch, seed + 1, TEXT, 24),
    }


class EasyAnimateValues(values.Values):
    """[text, video] with text projections; rotation of the video tokens alone."""

    def forward(self, hidden_states, encoder_hidden_states, image_rotary_emb=None):
        a, n = self.attn, encoder_hidden_states.shape[1]
        q, k, v = (values.split_heads(p(hidden_states), a.heads) for p in (a.to_q, a.to_k, a.to_v))
        q, k = (values.rotate(norm(t), image_rotary_emb) for norm, t in ((a.norm_q, q), (a.norm_k, k)))
        text = (a.add_q_proj, a.add_k_proj, a.add_v_proj)
        tq, tk, tv = (values.split_heads(p(encoder_hidden_states), a.heads) for p in text)
        tq, tk = a.norm_added_q(tq), a.norm_added_k(tk)
        q, k, v = (torch.cat(pair, dim=2) for pair in ((tq, q), (tk, k), (tv, v)))
        out = values.merge_heads(values.attend(q, k, v, slice(n, None)))
        return a.to_out[0](out[:, n:]), a.to_add_out(out[:, :n])


EASYANIMATE_BLOCK = BlockKind(
    returns="he",
    projections={"attn": ("attn1.to_out.0", "attn1.to_add_out"), "mlp": ("ff.net.2", "txt_ff.net.2")},
    values={"attn1": EasyAnimateValues},
)


# Motif-Video: its last single blocks start from the embedded video again


def motif(**config):
    return diffusers.MotifVideoTransformer3DModel(
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        num_single_layers=3,
        num_decoder_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=24,
        rope_axes_dim=(4, 6, 6),
        **{"in_channels": 4, **config},
    )


def motif_inputs(batch=2, seed=0):
    return {**easyanimate_inputs(batch, seed), "encoder_attention_mask": prefix_mask(batch, TEXT)}


MOTIF_STACKS = {
    "transformer_blocks": (2, dual(values.HunyuanValues)),
    "single_transformer_blocks": (3, single(values.HunyuanValues)),
}


def cog_like(name, make, call, layers, kind):
    return Family(name, make, call, numbered({"transformer_blocks": (layers, kind)}), thin=True)


VIDEO_JOINT = (
    Family("hunyuan_i2v", hunyuan_i2v, hunyuan_inputs, numbered(HUNYUAN_STACKS), thin=True),
    Family("framepack", framepack, framepack_inputs, numbered(HUNYUAN_STACKS), thin=True),
    cog_like("consisid", consisid, consisid_inputs, 4, COG_BLOCK),
    cog_like("easyanimate", easyanimate, easyanimate_inputs, 3, EASYANIMATE_BLOCK),
    # its encoder reaches the output through the decoder's attention alone
    Family("motif", motif, motif_inputs, numbered(MOTIF_STACKS), thin=True, visible=0.01),
)
