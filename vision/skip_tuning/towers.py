"""Towers: an image or text encoder seen as embedding, blocks and head, so that it can start from the middle.

A tower never computes what its result cannot depend on: text is cut behind the last end-of-text token, and the last
block runs for the one position that is pooled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipguide.errors import SkipError, UnknownBlockError


class Tower(ABC):
    """One encoder of a two-tower model.

    Attributes:
        blocks: the residual blocks in execution order.
        width: of the hidden states.
    """

    blocks: Sequence[nn.Module]
    width: int

    @abstractmethod
    def embed(self, inputs: Tensor) -> Tensor:
        """What enters the first block, [N, L, width]."""

    @abstractmethod
    def run(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        """Blocks `start` to `stop` (not included) on all positions."""

    @abstractmethod
    def last(self, hidden: Tensor, where: Tensor) -> Tensor:
        """The last block and the head, computed only for what is pooled: features [N, E], not normalised."""

    @abstractmethod
    def full(self, inputs: Tensor) -> Tensor:
        """The model's own features of the inputs, [N, E]; what `prefix` and `suffix` have to reproduce."""

    @abstractmethod
    def head(self) -> list[nn.Module | nn.Parameter]:
        """What comes after the blocks and is trained with them."""

    def prefix(self, inputs: Tensor, layer: int) -> Tensor:
        """The input of block `layer`, [N, L, width]."""
        return self.run(self.embed(inputs), 0, layer)

    def suffix(self, hidden: Tensor, where: Tensor, layer: int) -> Tensor:
        """Features [N, E], not normalised, from the input of block `layer`.

        Args:
            hidden: [N, L, width].
            where: the pooled position of every row [N]; image towers ignore it.
            layer: the block that `hidden` enters.
        """
        return self.last(self.run(hidden, layer, len(self.blocks) - 1), where)

    def trained(self, layer: int) -> list[nn.Parameter]:
        """The parameters from block `layer` on."""
        parts = [*self.blocks[layer:], *self.head()]
        return [p for part in parts for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())]


class TextTower(Tower):
    """A tower whose inputs are token ids [N, L]."""

    causal: bool

    @abstractmethod
    def pooled_at(self, tokens: Tensor) -> Tensor:
        """The position whose hidden state becomes the text's feature, [N]."""

    def crop(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Cut the tokens that no result depends on; returns the tokens and the pooled positions."""
        where = self.pooled_at(tokens)
        return (tokens[:, : int(where.max()) + 1] if self.causal else tokens), where


@dataclass
class Towers:
    """Both encoders of one model, and how their features become logits.

    Attributes:
        model: the model.
        image: the image tower.
        text: the text tower.
        image_size: height and width of the pixels it takes.
        context: most tokens a text may have.
    """

    model: nn.Module
    image: Tower
    text: TextTower
    image_size: int
    context: int

    def scale(self) -> Tensor:
        """What cosines are multiplied with, a scalar without gradient."""
        return self.model.get_parameter("logit_scale").detach().exp().reshape(())

    def bias(self) -> float | Tensor:
        """What is added to the logits (SigLIP), a scalar, or 0."""
        bias = getattr(self.model, "logit_bias", None)
        return 0.0 if bias is None else bias.detach().reshape(())

    def trained(self, image_layer: int, text_layer: int) -> list[str]:
        """Names of the parameters from the given blocks on, in the model's order."""
        wanted = {id(p) for p in self.image.trained(image_layer) + self.text.trained(text_layer)}
        return [name for name, p in self.model.named_parameters() if id(p) in wanted]


def find_towers(model: nn.Module) -> Towers:
    """Describe a two-tower model.

    Raises:
        UnknownBlockError: for a model that is none of CLIPModel, MetaClip2Model, SiglipModel of transformers, and
            no `open_clip` CLIP.
    """
    names = {cls.__name__ for cls in type(model).__mro__}
    if names & {"CLIPModel", "MetaClip2Model", "SiglipModel"}:
        return _transformers_towers(model, siglip="SiglipModel" in names)
    if type(model).__module__.startswith("open_clip."):
        from skipguide.vision.skip_tuning.open_clip_towers import open_clip_towers

        return open_clip_towers(model)
    parts = [name for name, _ in model.named_children()]
    raise UnknownBlockError(
        f"expected CLIPModel, MetaClip2Model or SiglipModel of transformers, or a CLIP of open_clip; "
        f"got {type(model).__name__} with {parts}"
    )


def check_no_dropout(model: nn.Module) -> None:
    """Refuse a model whose passes differ from each other: cached features would not be what it computes.

    Raises:
        SkipError: with the first module that drops something.
    """
    for name, module in model.named_modules():
        if name.endswith("lora_dropout") or ".lora_dropout." in name:
            continue
        for attribute in ("p", "dropout", "prob", "drop_prob"):
            value = getattr(module, attribute, None)
            if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                raise SkipError(
                    f"expected a model without dropout, because cached features have to be what the model computes; "
                    f"{name or type(model).__name__} ({type(module).__name__}) has {attribute}={value}: "
                    "set it to 0 (attention_dropout=0.0 in a transformers config)"
                )


# transformers


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


def _transformers_towers(model: Any, siglip: bool) -> Towers:
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
