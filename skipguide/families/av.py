"""Data only: the blocks of the transformers that make video and sound together, matched by class name."""

from __future__ import annotations

from skipguide.families.common import SIZES, TEXT_ALONE, paths
from skipguide.spec import BlockSpec, ModelSpec, Sublayer, TokenGrid

# Two streams of state, each with its own attention, feed-forward and text; they also attend to each other.
_LTX2 = BlockSpec(
    "transformer_blocks",
    streams=("hidden_states", "audio_hidden_states"),
    attn=(Sublayer("attn1"), Sublayer("audio_attn1", image=False)),
    cross_attn=paths("attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"),
    mlp=paths("ff", "audio_ff"),
)
# The text of either stream is refined first; every block after that reads the last of these texts.
_KANDINSKY6_TEXTS = tuple(
    BlockSpec(
        f"{modality}_text_transformer_blocks",
        streams=("x",),
        kept=True,
        image=False,
        why=TEXT_ALONE,
        attn=paths("attn"),
        mlp=paths("feed_forward"),
        shared=("rope",),
    )
    for modality in ("video", "audio")
)
_KANDINSKY6 = BlockSpec(
    "visual_transformer_blocks",
    streams=("vis", "aud"),
    attn=(Sublayer("video_dec_block.self_attention"), Sublayer("audio_dec_block.self_attention", image=False)),
    cross_attn=paths(
        "video_dec_block.cross_attention",
        "audio_dec_block.cross_attention",
        "va_cross_attention",
        "av_cross_attention",
    ),
    mlp=paths("video_dec_block.feed_forward", "audio_dec_block.feed_forward"),
    shared=("vis_rope", "aud_rope"),
)
# One sequence of text, video and audio tokens.
_MINIMAX_H3 = BlockSpec(
    "transformer_blocks",
    attn=paths("attn"),
    mlp=paths("ff"),
    shared=("temb", "adaln_indices", "rotary_emb"),
    image=False,
    why="text, video and sound are one sequence here, and it does not know which tokens are the video's",
)

AUDIO_VIDEO_FAMILIES: dict[str, ModelSpec] = {
    "LTX2VideoTransformer3DModel": ModelSpec((_LTX2,), grid=SIZES),
    "Kandinsky6Transformer3DModel": ModelSpec(
        (*_KANDINSKY6_TEXTS, _KANDINSKY6), shared=("visual_rope_pos",), grid=TokenGrid("bfhwc")
    ),
    "MiniMaxH3Transformer3DModel": ModelSpec(
        (_MINIMAX_H3,),
        shared=(
            "timestep",
            "timestep_indices",
            "token_tags",
            "position_ids",
            "video_indices",
            "audio_indices",
            "text_indices",
        ),
    ),
}
