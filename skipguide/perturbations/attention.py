"""Changed attention: what attention gives the image's tokens is changed; what it gives the text stays as it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from skipguide.active import ActivePlan, Call
from skipguide.arguments import Arguments
from skipguide.blocks import Block
from skipguide.errors import SkipError
from skipguide.hosts.attention_backends import TorchAttention
from skipguide.hosts.diffusers_caches import is_cached_inside
from skipguide.hosts.torch_modes import call_in
from skipguide.hosts.wrappers import unwrap
from skipguide.parts import PART_SPECS, Perturbation
from skipguide.perturbations.grid import BlockGrid, Grid


@dataclass
class SelfAttention:
    """One call of torch's attention, after norms and rotations.

    Attributes:
        query: `[..., heads, tokens, channels]`, likewise `key` and `value`.
        mask: of the scores, or None.
        further: the call's other arguments.
        image: which of the tokens are the image's (or video's); the others are the text's.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    further: dict[str, Any]
    image: slice

    def attend(self, rows: slice | Tensor, query: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
        """What the queries of some tokens get, or other queries in their place, from all keys or some."""
        mask, key, value = self.mask, self.key, self.value
        if mask is not None and mask.shape[-2] == self.query.shape[-2]:
            mask = mask[..., rows, :]
        if keys is not None:
            key, value = key[..., keys, :], value[..., keys, :]
            mask = mask[..., keys] if mask is not None and mask.shape[-1] > 1 else mask
        if query is None:
            query = self.query[..., rows, :]
        return F.scaled_dot_product_attention(query, key, value, **(self.further | {"attn_mask": mask}))

    def of_heads(self, heads: Tensor) -> SelfAttention:
        """The same call for some heads."""
        mask = self.mask
        if mask is not None and mask.dim() > 2 and mask.shape[-3] > 1:
            mask = mask.index_select(-3, heads)
        key, value = (self._as_many(each).index_select(-3, heads) for each in (self.key, self.value))
        return replace(self, query=self.query.index_select(-3, heads), key=key, value=value, mask=mask)

    def values(self) -> Tensor:
        """The values of the image's tokens, for each head of the queries."""
        return self._as_many(self.value)[..., self.image, :]

    def _as_many(self, each: Tensor) -> Tensor:
        """Keys or values for each head of the queries: several may share them."""
        shared = self.query.shape[-3] // each.shape[-3]
        return each.repeat_interleave(shared, dim=-3) if shared > 1 else each


class Change(Protocol):
    """What the image's tokens get in place of what attention gives them."""

    def __call__(self, attention: SelfAttention, grid: Grid) -> Tensor:
        """Make `[..., heads, image tokens, channels]`; `grid` is where they lie, for parts that need it."""


class ChangedAttention:
    """A module runs with its self-attention changed for the image's tokens, in some heads or all.

    Args:
        name: of the module.
        module: a block with joint attention, or the self-attention of one stream.
        block: the block.
        perturbation: part, strength and heads.
        change: what happens to the attention.
    """

    __slots__ = ("arguments", "change", "grid", "heads", "joint", "module", "name", "part", "seen", "strength")

    def __init__(self, name: str, module: nn.Module, block: Block, perturbation: Perturbation, change: Change) -> None:
        self.arguments = Arguments(module)
        self.module = module
        self.joint = block.spec.joint
        self.name = name
        self.part = perturbation.part
        self.strength = perturbation.strength
        heads: Any = perturbation.heads
        self.heads: tuple[int, ...] | None = heads
        self.change = change
        self.seen = False  # whether some pass went through an attention that was changed
        self.grid = BlockGrid(block, self.part) if "grid" in PART_SPECS[self.part].needs else None

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module with every attention over image tokens changed for those tokens."""
        image = text = 0
        if self.joint:
            image = self.arguments.get("hidden_states", args, kwargs).shape[1]
            text = self.arguments.get("encoder_hidden_states", args, kwargs).shape[1]
        # a compiled module is rewritten while it is traced; its graph must not be rewritten once more when it runs
        compiled = self.module.__dict__.get("_compiled_call_impl") is not None or unwrap(self.module) is not self.module
        mode = _AttentionMode(self, plan.grid, image, text if self.joint == "text_first" else 0, compiled)
        # while a whole model is traced its processors stay what they are, as what is traced is guarded on them
        if torch.compiler.is_compiling():
            with mode:
                out = call(*args, **kwargs)
        else:
            out = self._run(mode, call, args, kwargs)
        if mode.hits:
            self.seen = True
        elif not (self.seen and is_cached_inside(self.module)):  # a cache answers with what it saw in an earlier pass
            raise SkipError(
                f"{self.part} saw no call of torch's scaled_dot_product_attention in {self.name}: another attention "
                f"backend is active. Use model.set_attention_backend('native'), or part='block'"
            )
        return out

    def _run(self, mode: _AttentionMode, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module in the mode, and leave neither the mode nor another backend behind, whatever interrupts it."""
        override = TorchAttention(self.module, self.name, self.part)
        try:
            try:
                override.hold()
                return call_in(mode, call, *args, **kwargs)
            finally:
                mode.on = False  # one that an interrupt leaves on torch's stack does nothing
        finally:
            try:
                override.release()
            except BaseException:  # Ctrl-C: what was broken off is done again
                override.release()
                raise

    def attend(self, attention: SelfAttention, full: Grid | None) -> Tensor:
        """All tokens' results: changed for the image's, as always for the text's."""
        image = attention.image
        count, length = image.stop - image.start, attention.query.shape[-2]
        grid = (count, 1, 1) if self.grid is None else self.grid.of(full, count)
        if self.heads is None and self.strength == 1:
            shape = (*attention.query.shape[:-1], attention.value.shape[-1])
            out = torch.empty(shape, dtype=attention.value.dtype, device=attention.value.device)
            out[..., image, :] = self.change(attention, grid)
            for text in (slice(0, image.start), slice(image.stop, length)):
                if text.start < text.stop:
                    out[..., text, :] = attention.attend(text)
            return out
        out = attention.attend(slice(0, length))
        heads = torch.arange(out.shape[-3], device=out.device) if self.heads is None else self._heads(out)
        changed = self.change(attention.of_heads(heads), grid)
        plain = out[..., image, :].index_select(-3, heads)
        made = out[..., image, :].index_copy(-3, heads, torch.lerp(plain, changed.to(plain.dtype), self.strength))
        return torch.cat([out[..., : image.start, :], made, out[..., image.stop :, :]], dim=-2)

    def _heads(self, out: Tensor) -> Tensor:
        """The heads that are concerned, as an index.

        Raises:
            SkipError: for one that this attention does not have.
        """
        assert self.heads is not None
        if out.dim() < 4 or self.heads[-1] >= out.shape[-3]:
            count = out.shape[-3] if out.dim() > 3 else 1
            raise SkipError(f"{self.name} has {count} heads of attention, 0 to {count - 1}; got heads={self.heads}")
        return torch.tensor(self.heads, device=out.device)


class _AttentionMode(TorchFunctionMode):
    """Rewrites scaled_dot_product_attention: image tokens get what the change gives them."""

    def __init__(self, owner: ChangedAttention, grid: Grid | None, image: int, start: int, tracing: bool) -> None:
        super().__init__()
        self.owner = owner
        self.grid = grid
        self.image = image  # how many tokens of joint attention; 0: all are the image's
        self.start = start
        self.tracing = tracing
        self.hits = 0
        self.on = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        attends = self.on and func is F.scaled_dot_product_attention
        if not attends or (self.tracing and not torch.compiler.is_compiling()):
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask")
        given = dict(zip(names, args, strict=False)) | kwargs
        query, key, value = (given.pop(name) for name in names[:3])
        mask = given.pop("attn_mask", None)
        self.hits += 1
        part, length = self.owner.part, query.shape[-2]
        image = self.image or length
        start = self.start if length > image else 0
        if key.shape[-2] != length:
            raise SkipError(
                f"{part} is about self-attention, where queries and keys are the same tokens; a block has "
                f"{length} queries and {key.shape[-2]} keys of something else, such as an IP-Adapter's picture: take "
                f"that away (pipe.unload_ip_adapter()), or use part='attn' or 'block'"
            )
        if length < image:
            raise SkipError(
                f"{part} expected self-attention over {image} tokens and text; got {length} tokens: this "
                f"attention sees a part of them. Use part='attn' or 'block'"
            )
        attention = SelfAttention(query, key, value, mask, given, slice(start, start + image))
        return self.owner.attend(attention, self.grid)
