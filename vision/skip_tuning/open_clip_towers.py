"""The towers of an `open_clip` CLIP, which keeps OpenAI's names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from skipguide.errors import SkipError
from skipguide.vision.skip_tuning.tower import TextTower, Tower, Towers


def _one_query(block: Any, hidden: Tensor, where: Tensor | None, keep: Tensor | None) -> Tensor:
    """One residual attention block for one position per row, [N, width]."""
    rows = torch.arange(len(hidden), device=hidden.device)
    normed = block.ln_1(hidden)
    query, residual = (normed[:, 0], hidden[:, 0]) if where is None else (normed[rows, where], hidden[rows, where])
    mask = None if keep is None else (~keep).repeat_interleave(block.attn.num_heads, 0)[:, None]
    attended = block.attn(query[:, None], normed, normed, need_weights=False, attn_mask=mask)[0][:, 0]
    hidden = residual + block.ls_1(attended)
    out: Tensor = hidden + block.ls_2(block.mlp(block.ln_2(hidden)))
    return out


class _Image(Tower):
    def __init__(self, model: Any) -> None:
        self.visual = model.visual
        self.blocks = self.visual.transformer.resblocks
        self.width = self.visual.positional_embedding.shape[1]
        self.first_only = (
            self.visual.attn_pool is None and self.visual.pool_type == "tok" and not self.visual.final_ln_after_pool
        )

    def embed(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.visual._embeds(inputs)
        return out

    def run(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        for block in self.blocks[start:stop]:
            hidden = block(hidden)
        return hidden

    def last(self, hidden: Tensor, where: Tensor) -> Tensor:
        if self.first_only:
            pooled = self.visual.ln_post(_one_query(self.blocks[-1], hidden, None, None))
        else:
            pooled = self.visual._pool(self.blocks[-1](hidden))[0]
        return pooled if self.visual.proj is None else pooled @ self.visual.proj

    def full(self, inputs: Tensor) -> Tensor:
        out = self.visual(inputs)
        return out[0] if isinstance(out, tuple) else out

    def head(self) -> list[nn.Module | nn.Parameter]:
        parts = [self.visual.attn_pool, self.visual.ln_post, self.visual.proj]
        return [part for part in parts if part is not None]


class _Text(TextTower):
    def __init__(self, model: Any) -> None:
        self.model = model
        self.blocks = model.transformer.resblocks
        self.width = model.positional_embedding.shape[1]
        self.causal = model.attn_mask is not None and model.text_pool_type in ("argmax", "eos")

    def embed(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.model.token_embedding(inputs) + self.model.positional_embedding[: inputs.shape[1]]
        return out

    def run(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        mask, length = self.model.attn_mask, hidden.shape[1]
        for block in self.blocks[start:stop]:
            hidden = block(hidden, attn_mask=None if mask is None else mask[:length, :length])
        return hidden

    def last(self, hidden: Tensor, where: Tensor) -> Tensor:
        keep = None
        if self.model.attn_mask is not None:
            keep = torch.arange(hidden.shape[1], device=hidden.device) <= where[:, None]
        pooled = self.model.ln_final(_one_query(self.blocks[-1], hidden, where, keep))
        projection = self.model.text_projection
        if projection is None:
            return pooled
        out: Tensor = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
        return out

    def full(self, inputs: Tensor) -> Tensor:
        # open_clip wants texts of exactly its context length; what follows the end of a text does not matter.
        missing = len(self.model.positional_embedding) - inputs.shape[1]
        out: Tensor = self.model.encode_text(torch.nn.functional.pad(inputs, (0, missing)))
        return out

    def head(self) -> list[nn.Module | nn.Parameter]:
        parts = [self.model.ln_final, self.model.text_projection]
        return [part for part in parts if part is not None]

    def pooled_at(self, tokens: Tensor) -> Tensor:
        kind = self.model.text_pool_type
        if kind == "first":
            return torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
        if kind == "last":
            return torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device)
        if kind == "eos":
            return (tokens == self.model.text_eos_id).int().argmax(1)
        return tokens.argmax(1)


def open_clip_towers(model: Any) -> Towers:
    """Describe an open_clip CLIP with a vision transformer.

    Raises:
        SkipError: for a ResNet or timm image tower, a separate text model (CustomTextCLIP), or modified blocks.
    """
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    visual = getattr(model, "visual", None)
    if not isinstance(visual, VisionTransformer) or not hasattr(model, "transformer"):
        raise SkipError(
            f"expected an open_clip CLIP with a VisionTransformer and its text blocks in `transformer`; got "
            f"{type(model).__name__} with {type(visual).__name__}: of SigLIP take SiglipModel of transformers; EVA, "
            "ConvNeXt and ResNet towers and Hugging Face's text towers are not supported, choose a ViT-* of open_clip"
        )
    for blocks in (visual.transformer, model.transformer):
        strange = next((b for b in blocks.resblocks if type(b) is not ResidualAttentionBlock), None)
        if strange is not None or not blocks.batch_first:
            raise SkipError(
                f"expected open_clip's plain ResidualAttentionBlock with batch_first=True; got "
                f"{type(strange or blocks).__name__}"
            )
    if model.text_pool_type not in ("argmax", "eos", "first", "last"):
        raise SkipError(f"expected a text pooling of one position; got {model.text_pool_type!r}")
    size = visual.image_size
    return Towers(
        model=model,
        image=_Image(model),
        text=_Text(model),
        image_size=size[0] if isinstance(size, tuple | list) else int(size),
        context=len(model.positional_embedding),
    )
