"""What the descriptions of several families share: names of streams and arguments, and common sublayers."""

from __future__ import annotations

from skipguide.spec import Sublayer, TokenGrid

TEXT_AND_VIDEO = ("hidden_states", "encoder_hidden_states")
ROPE = ("image_rotary_emb", "freqs_cis", "rotary_emb")


def paths(*names: str) -> tuple[Sublayer, ...]:
    """Sublayers with one stream in and out."""
    return tuple(Sublayer(name) for name in names)


def anything(*names: str) -> tuple[Sublayer, ...]:
    """Sublayers with one stream in and out, whatever their first argument is called."""
    return tuple(Sublayer(name, outputs=("",)) for name in names)


# Where the tokens of Flux and its kin are.
PLACES = ("txt_ids", "img_ids")
# Attention over text and video together returns one output per stream.
JOINT_ATTN = Sublayer("attn", outputs=TEXT_AND_VIDEO)
JOINT_ATTN1 = Sublayer("attn1", outputs=TEXT_AND_VIDEO)
# Parallel blocks: the feed-forward's residual contribution is what proj_mlp feeds to proj_out (act(0) = 0).
PARALLEL_MLP = (Sublayer("proj_mlp", width="out_features", scaled_at=("act_mlp",)),)

# Where the tokens lie: latents of a video or picture in patches, sizes that are said in the call, places of tokens.
VIDEO = TokenGrid("bcfhw")
FRAMES_FIRST = TokenGrid("bfchw")
PICTURE = TokenGrid("bchw", frames=False)
SIZES = TokenGrid("sizes")
IMG_IDS = TokenGrid("places", "img_ids", frames=False)

# Why blocks lack some parts.
PACKED = "text and image are one sequence here, and it does not know which tokens are the image's"
LINEAR = "its attention is linear, and has no map"
TEXT_ALONE = "its stream is the text"
PICTURE_AND_TEXT = "its one attention has the picture's keys and the text's side by side, and its input is a picture"
