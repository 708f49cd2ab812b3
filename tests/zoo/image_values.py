"""Joint attention of the image transformers with the identity as attention map of the image tokens, by hand."""

import torch

from zoo import values
from zoo.values import FluxValues, SD3Values, Values, merge_heads, rotate, split_heads


class ChromaValues(FluxValues):
    """As Flux, with a mask over [text, image] that the block has made square."""

    def forward(self, hidden_states, encoder_hidden_states, image_rotary_emb, attention_mask=None):
        a, n = self.attn, encoder_hidden_states.shape[1]
        q, k, v = (split_heads(p(hidden_states), a.heads) for p in (a.to_q, a.to_k, a.to_v))
        text = (a.add_q_proj, a.add_k_proj, a.add_v_proj)
        tq, tk, tv = (split_heads(p(encoder_hidden_states), a.heads) for p in text)
        q, k, tq, tk = a.norm_q(q), a.norm_k(k), a.norm_added_q(tq), a.norm_added_k(tk)
        q, k, v = (torch.cat(pair, dim=2) for pair in ((tq, q), (tk, k), (tv, v)))
        q, k = rotate(q, image_rotary_emb), rotate(k, image_rotary_emb)
        out = merge_heads(values.attend(q, k, v, slice(n, None), attention_mask))
        return a.to_out[0](out[:, n:]), a.to_add_out(out[:, :n])


class QwenValues(Values):
    """[text, image]; both rotated, by complex numbers of their own; text keys masked."""

    def forward(self, hidden_states, encoder_hidden_states, encoder_hidden_states_mask=None, image_rotary_emb=None):
        a, n = self.attn, encoder_hidden_states.shape[1]
        q, k, v = (split_heads(p(hidden_states), a.heads) for p in (a.to_q, a.to_k, a.to_v))
        text = (a.add_q_proj, a.add_k_proj, a.add_v_proj)
        tq, tk, tv = (split_heads(p(encoder_hidden_states), a.heads) for p in text)
        image_turn, text_turn = image_rotary_emb
        q, k = self.turn(a.norm_q(q), image_turn), self.turn(a.norm_k(k), image_turn)
        tq, tk = self.turn(a.norm_added_q(tq), text_turn), self.turn(a.norm_added_k(tk), text_turn)
        q, k, v = (torch.cat(pair, dim=2) for pair in ((tq, q), (tk, k), (tv, v)))
        mask = None
        if encoder_hidden_states_mask is not None:
            seen = torch.ones(len(hidden_states), hidden_states.shape[1], dtype=torch.bool)
            mask = torch.cat([encoder_hidden_states_mask, seen], dim=1)[:, None, None]
        out = merge_heads(values.attend(q, k, v, slice(n, None), mask))
        return a.to_out[0](out[:, n:]), a.to_add_out(out[:, :n])

    @staticmethod
    def turn(x, angles):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * angles).flatten(-2)


class AuraFlowValues(SD3Values):
    """[text, image], no rotation."""

    def forward(self, hidden_states, encoder_hidden_states):
        a, n = self.attn, encoder_hidden_states.shape[1]
        q, k, v = (split_heads(p(hidden_states), a.heads) for p in (a.to_q, a.to_k, a.to_v))
        text = (a.add_q_proj, a.add_k_proj, a.add_v_proj)
        tq, tk, tv = (split_heads(p(encoder_hidden_states), a.heads) for p in text)
        q, k, tq, tk = a.norm_q(q), a.norm_k(k), a.norm_added_q(tq), a.norm_added_k(tk)
        q, k, v = (torch.cat(pair, dim=2) for pair in ((tq, q), (tk, k), (tv, v)))
        out = merge_heads(values.attend(q, k, v, slice(n, None)))
        return a.to_out[0](out[:, n:]), a.to_add_out(out[:, :n])


class HiDreamValues(Values):
    """[image, text]; norms over all heads at once; rotation matrices [B, S, 1, D/2, 2, 2]."""

    def forward(self, norm_hidden_states, hidden_states_masks, norm_encoder_hidden_states, image_rotary_emb):
        a, n = self.attn, norm_hidden_states.shape[1]
        x, text = norm_hidden_states, norm_encoder_hidden_states
        q = torch.cat([a.q_rms_norm(a.to_q(x)), a.q_rms_norm_t(a.to_q_t(text))], dim=1)
        k = torch.cat([a.k_rms_norm(a.to_k(x)), a.k_rms_norm_t(a.to_k_t(text))], dim=1)
        v = split_heads(torch.cat([a.to_v(x), a.to_v_t(text)], dim=1), a.heads)
        q, k = (self.turn(split_heads(t, a.heads), image_rotary_emb) for t in (q, k))
        out = merge_heads(values.attend(q, k, v, slice(n)))
        return a.to_out(out[:, :n]), a.to_out_t(out[:, n:])

    @staticmethod
    def turn(x, matrices):
        pairs = x.unflatten(-1, (-1, 1, 2))  # [B, H, S, D/2, 1, 2]
        return (matrices.transpose(1, 2) * pairs).sum(dim=-1).flatten(-2)


class CogView4Values(Values):
    """[text, image], one set of projections; the image rotated by halves; a mask of ones and zeros that is added."""

    def forward(self, hidden_states, encoder_hidden_states, image_rotary_emb, attention_mask=None, kv_cache=None):
        a, n = self.attn, encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        q, k, v = (split_heads(p(x), a.heads) for p in (a.to_q, a.to_k, a.to_v))
        q, k = a.norm_q(q), a.norm_k(k)
        q, k = (torch.cat([t[:, :, :n], self.turn(t[:, :, n:], image_rotary_emb)], dim=2) for t in (q, k))
        mask = None
        if attention_mask is not None:
            seen = torch.cat([attention_mask.float(), torch.ones(len(x), hidden_states.shape[1])], dim=1)
            mask = ((seen[:, :, None] * seen[:, None]) > 0)[:, None].float()
        out = a.to_out[0](merge_heads(values.attend(q, k, v, slice(n, None), mask)))
        return out[:, n:], out[:, :n]

    @staticmethod
    def turn(x, rotary):
        cos, sin = rotary
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-right, left], dim=-1) * sin
