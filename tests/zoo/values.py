"""Self-attention with the identity as attention map for the video tokens, written out family by family.

Each class takes the place of one attention module of a stock diffusers block (same arguments, same results)
and uses its weights. Text queries, where there are any, attend to everything as in the stock model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, H*D] -> [B, H, S, D]."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Interleaved pairs of [B, H, S, D] turned by cos, sin of [S, D]."""
    cos, sin = rotary
    pairs = x.unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return x * cos + turned * sin


def attend(q: Tensor, k: Tensor, v: Tensor, video: slice, mask: Tensor | None = None) -> Tensor:
    """Attention of all queries, then the video rows overwritten by their own values."""
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).clone()
    out[:, :, video] = v[:, :, video]
    return out


class Values(nn.Module):
    """Base: keeps the attention module, whose weights these are, and the number of text tokens."""

    def __init__(self, attn: nn.Module, text_length: int):
        super().__init__()
        self.attn = attn
        self.text_length = text_length


class SelfValues(Values):
    """Video tokens alone (LTX, Wan, Latte, the second attention of SD3.5)."""

    def forward(self, hidden_states, *args, **kwargs):
        return self.attn.to_out[0](self.attn.to_v(hidden_states))


class CogVideoXValues(Values):
    """One set of projections for cat([text, video]); rotation of the video tokens alone."""

    def forward(self, hidden_states, encoder_hidden_states, image_rotary_emb=None):
        a, n = self.attn, encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        q, k, v = (split_heads(p(x), a.heads) for p in (a.to_q, a.to_k, a.to_v))
        q, k = a.norm_q(q), a.norm_k(k)
        if image_rotary_emb is not None:
            q, k = (torch.cat([t[:, :, :n], rotate(t[:, :, n:], image_rotary_emb)], dim=2) for t in (q, k))
        out = a.to_out[0](merge_heads(attend(q, k, v, slice(n, None))))
        return out[:, n:], out[:, :n]


class MochiValues(Values):
    """[video, valid text], row by row; a rotation per head of the video tokens; padded text gives zero."""

    def forward(self, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb):
        a, n = self.attn, hidden_states.shape[1]
        q, k, v = (split_heads(p(hidden_states), a.heads) for p in (a.to_q, a.to_k, a.to_v))
        text = (a.add_q_proj, a.add_k_proj, a.add_v_proj)
        tq, tk, tv = (split_heads(p(encoder_hidden_states), a.heads) for p in text)
        cos, sin = (f.transpose(0, 1) for f in image_rotary_emb)  # [S, H, D/2] -> [H, S, D/2]
        q, k = (self.turn(norm(t), cos, sin) for norm, t in ((a.norm_q, q), (a.norm_k, k)))
        tq, tk = a.norm_added_q(tq), a.norm_added_k(tk)
        out = torch.zeros_like(torch.cat([q, tq], dim=2))
        for r, valid in enumerate(attention_mask.bool()):
            whole = [torch.cat([x[r], y[r][:, valid]], dim=1)[None] for x, y in ((q, tq), (k, tk), (v, tv))]
            out[r, :, : n + valid.sum()] = attend(*whole, slice(n))[0]
        out = merge_heads(out)
        text_out = a.to_add_out(out[:, n:]) if hasattr(a, "to_add_out") else out[:, n:]
        return a.to_out[0](out[:, :n]), text_out

    @staticmethod
    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class HunyuanValues(Values):
    """[video, text]; separate text projections in the dual blocks, the same ones in the single blocks."""

    def mask(self, attention_mask: Tensor, length: int) -> Tensor:
        return attention_mask  # [B, 1, 1, S], keys alone

    def forward(self, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb):
        a, n = self.attn, hidden_states.shape[1]
        q, k, v = (split_heads(p(hidden_states), a.heads) for p in (a.to_q, a.to_k, a.to_v))
        q, k = (rotate(norm(t), image_rotary_emb) for norm, t in ((a.norm_q, q), (a.norm_k, k)))
        single = a.add_q_proj is None
        text = (a.to_q, a.to_k, a.to_v) if single else (a.add_q_proj, a.add_k_proj, a.add_v_proj)
        tq, tk, tv = (split_heads(p(encoder_hidden_states), a.heads) for p in text)
        tq = (a.norm_q if single else a.norm_added_q)(tq)
        tk = (a.norm_k if single else a.norm_added_k)(tk)
        q, k, v = (torch.cat(pair, dim=2) for pair in ((q, tq), (k, tk), (v, tv)))
        out = merge_heads(attend(q, k, v, slice(n), self.mask(attention_mask, q.shape[2])))
        video, text = out[:, :n], out[:, n:]
        return (video, text) if single else (a.to_out[0](video), a.to_add_out(text))


class Hunyuan15Values(HunyuanValues):
    """As the dual blocks of HunyuanVideo, with a text mask on queries and keys: a masked query gets zero."""

    def mask(self, attention_mask: Tensor, length: int) -> Tensor:
        valid = F.pad(attention_mask.bool(), (length - attention_mask.shape[1], 0), value=True)
        return (valid[:, :, None] & valid[:, None, :])[:, None]


class SD3Values(Values):
    """[image, text], no rotation; the last block has no text output."""

    def forward(self, hidden_states, encoder_hidden_states):
        a, n = self.attn, hidden_states.shape[1]
        q, k, v = (split_heads(p(hidden_states), a.heads) for p in (a.to_q, a.to_k, a.to_v))
        text = (a.add_q_proj, a.add_k_proj, a.add_v_proj)
        tq, tk, tv = (split_heads(p(encoder_hidden_states), a.heads) for p in text)
        if a.norm_q is not None:
            q, k, tq, tk = a.norm_q(q), a.norm_k(k), a.norm_added_q(tq), a.norm_added_k(tk)
        q, k, v = (torch.cat(pair, dim=2) for pair in ((q, tq), (k, tk), (v, tv)))
        out = merge_heads(attend(q, k, v, slice(n)))
        video, text = out[:, :n], out[:, n:]
        return a.to_out[0](video), (text if a.context_pre_only else a.to_add_out(text))


class FluxValues(Values):
    """[text, image], rotation of both."""

    def forward(self, hidden_states, encoder_hidden_states, image_rotary_emb):
        a, n = self.attn, encoder_hidden_states.shape[1]
        q, k, v = (split_heads(p(hidden_states), a.heads) for p in (a.to_q, a.to_k, a.to_v))
        text = (a.add_q_proj, a.add_k_proj, a.add_v_proj)
        tq, tk, tv = (split_heads(p(encoder_hidden_states), a.heads) for p in text)
        q, k, tq, tk = a.norm_q(q), a.norm_k(k), a.norm_added_q(tq), a.norm_added_k(tk)
        q, k, v = (torch.cat(pair, dim=2) for pair in ((tq, q), (tk, k), (tv, v)))
        q, k = rotate(q, image_rotary_emb), rotate(k, image_rotary_emb)
        out = merge_heads(attend(q, k, v, slice(n, None)))
        return a.to_out[0](out[:, n:]), a.to_add_out(out[:, :n])


class FluxSingleValues(Values):
    """One stream cat([text, image]): the attention cannot see where the text ends, so it is told."""

    def forward(self, hidden_states, image_rotary_emb):
        a, n = self.attn, self.text_length
        q, k, v = (split_heads(p(hidden_states), a.heads) for p in (a.to_q, a.to_k, a.to_v))
        q, k = (rotate(norm(t), image_rotary_emb) for norm, t in ((a.norm_q, q), (a.norm_k, k)))
        return merge_heads(attend(q, k, v, slice(n, None)))
