"""The towers of a CLIP or SigLIP of `transformers`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipguide.errors import SkipError
from skipguide.vision.skip_tuning.tower import TextTower, Tower, Towers


def _one_query(layer: Any, hidden: Tensor, where: Tensor | None, keep: Tensor | None) -> Tensor:
    """One encoder layer of transformers for one position per row, [N, width].

    Keys and values come from all positions; query, output projection and MLP run once per row.

    Args:
        layer: a CLIP or SigLIP encoder layer.
        hidden: [N, L, width].
        where: the position of every row [N]; None is the first.
        keep: bool [N, L], which positions it may look at; None is all.
    """
    attention = layer.self_attn
    count, length, _ = hidden.shape
    normed = layer.layer_norm1(hidden)
    rows = torch.arange(count, device=hidden.device)
    query, residual = (normed[:, 0], hidden[:, 0]) if where is None else (normed[rows, where], hidden[rows, where])

    def heads(projected: Tensor, positions: int) -> Tensor:
        return projected.view(count, positions, attention.num_heads, -1).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        heads(attention.q_proj(query), 1),
        heads(attention.k_proj(normed), length),
        heads(attention.v_proj(normed), length),
        attn_mask=None if keep is None else keep[:, None, None],
        scale=attention.scale,
    )
    hidden = residual + attention.out_proj(out.transpose(1, 2).reshape(count, -1))
    return hidden + layer.mlp(layer.layer_norm2(hidden))


class _VisionTower(Tower):
    def __init__(self, model: Any) -> None:
        self.model, self.vision = model, model.vision_model
        self.blocks = self.vision.encoder.layers
        self.width = self.vision.config.hidden_size

    def run(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        for block in self.blocks[start:stop]:
            hidden = block(hidden, None)
        return hidden

    def full(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.model.get_image_features(pixel_values=inputs).pooler_output
        return out


class _CLIPVision(_VisionTower):
    def embed(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.vision.pre_layrnorm(self.vision.embeddings(inputs))
        return out

    def last(self, hidden: Tensor, where: Tensor) -> Tensor:
        pooled = self.vision.post_layernorm(_one_query(self.blocks[-1], hidden, None, None))
        out: Tensor = self.model.visual_projection(pooled)
        return out

    def head(self) -> list[nn.Module | nn.Parameter]:
        return [self.vision.post_layernorm, self.model.visual_projection]


class _SiglipVision(_VisionTower):
    def embed(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.vision.embeddings(inputs)
        return out

    def last(self, hidden: Tensor, where: Tensor) -> Tensor:
        # The attention pooling looks at every position, so the last block runs for all of them.
        last = len(self.blocks) - 1
        out: Tensor = self.vision.head(self.vision.post_layernorm(self.run(hidden, last, last + 1)))
        return out

    def head(self) -> list[nn.Module | nn.Parameter]:
        return [self.vision.post_layernorm, self.vision.head]


class _Text(TextTower):
    def __init__(self, model: Any, causal: bool) -> None:
        self.model, self.text, self.causal = model, model.text_model, causal
        self.blocks = self.text.encoder.layers
        self.width = self.text.config.hidden_size

    def embed(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.text.embeddings(input_ids=inputs)
        return out

    def run(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        more: dict[str, Any] = {}
        mask = None
        if self.causal:
            from transformers.masking_utils import create_causal_mask

            # neither padding nor a cache; by place, as versions of transformers name the cache differently
            mask = create_causal_mask(self.text.config, hidden, None, None)
            more["is_causal"] = True
        for block in self.blocks[start:stop]:
            hidden = block(hidden, mask, **more)
        return hidden

    def last(self, hidden: Tensor, where: Tensor) -> Tensor:
        keep = torch.arange(hidden.shape[1], device=hidden.device) <= where[:, None] if self.causal else None
        pooled = self.text.final_layer_norm(_one_query(self.blocks[-1], hidden, where, keep))
        out: Tensor = self.model.text_projection(pooled) if self.causal else self.text.head(pooled)
        return out

    def full(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.model.get_text_features(input_ids=inputs).pooler_output
        return out

    def head(self) -> list[nn.Module | nn.Parameter]:
        return [self.text.final_layer_norm, self.model.text_projection if self.causal else self.text.head]

    def pooled_at(self, tokens: Tensor) -> Tensor:
        if not self.causal:
            return torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device)
        end = self.text.config.eos_token_id
        if end == 2:  # OpenAI's checkpoints carry a wrong id; there the largest id ends the text
            return tokens.argmax(1)
        found = tokens == end
        if not bool(found.any(1).all()):
            row = int((~found.any(1)).nonzero()[0])
            raise SkipError(
                f"expected an end-of-text token ({end}) in every text; text {row} has none: "
                f"shorten it, or check that the tokenizer belongs to the model"
            )
        return found.int().argmax(1)


def transformers_towers(model: Any, siglip: bool) -> Towers:
    """Describe a CLIPModel, MetaClip2Model or SiglipModel.

    Raises:
        SkipError: for a SiglipModel without its pooling head.
    """
    if siglip and not model.vision_model.config.vision_use_head:
        raise SkipError(
            "expected a SiglipModel with its pooling head; got vision_use_head=False, which has no features"
        )
    return Towers(
        model=model,
        image=_SiglipVision(model) if siglip else _CLIPVision(model),
        text=_Text(model, causal=not siglip),
        image_size=model.config.vision_config.image_size,
        context=model.config.text_config.max_position_embeddings,
    )
