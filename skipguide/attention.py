"""Attention identity: the attention map is the identity, so the values pass (STG-A, arXiv 2411.18664 section 3)."""

from __future__ import annotations

from typing import Any

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

_PROJECTIONS = (("to_v", "to_out"), ("to_value", "out_layer"))


class ValuesPass:
    """Self-attention of one stream becomes the output projection of its values; queries and keys are not computed."""

    __slots__ = ("arguments", "attention", "name", "projections")

    def __init__(self, name: str, module: nn.Module) -> None:
        found = [pair for pair in _PROJECTIONS if None not in (getattr(module, each, None) for each in pair)]
        if not found:
            raise SkipError(
                f"attn_identity needs to_v and to_out on {name} ({type(module).__name__}), which has none: use "
                f"part='attn' or 'block' on this model"
            )
        self.projections = found[0]  # names: an adapter that is added later takes the place of the modules
        self.arguments = Arguments(module)
        self.attention = module
        self.name = name

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return to_out(to_v(x))."""
        if not torch.compiler.is_compiling():
            plan.skipped(self.name)
        given: Tensor = self.arguments.get("hidden_states", args, kwargs)
        values, out = (getattr(self.attention, name) for name in self.projections)
        hidden = values(given)
        if (gates := getattr(self.attention, "to_gate_logits", None)) is not None:  # LTX-2.3: a gate per head
            heads = 2 * gates(given).sigmoid()
            hidden = (hidden.unflatten(-1, (heads.shape[-1], -1)) * heads[..., None]).flatten(-2)
        for layer in out if isinstance(out, nn.ModuleList) else (out,):
            hidden = layer(hidden)
        return hidden


class JointValuesPass:
    """In joint attention the values pass for the video (or image) tokens; text tokens attend as they always do."""

    __slots__ = ("arguments", "joint", "module", "name", "seen")

    def __init__(self, block: Block) -> None:
        self.arguments = Arguments(block.module)
        self.module = block.module
        self.joint = block.spec.joint
        self.name = block.name
        self.seen = False  # whether some pass went through an attention that was replaced

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block with every attention over video tokens replaced for those tokens."""
        video = self.arguments.get("hidden_states", args, kwargs).shape[1]
        text = self.arguments.get("encoder_hidden_states", args, kwargs).shape[1]
        # a compiled block is rewritten while it is traced; its graph must not be rewritten once more when it runs
        compiled = self.module.__dict__.get("_compiled_call_impl") is not None or unwrap(self.module) is not self.module
        mode = _IdentityMode(video, text if self.joint == "text_first" else None, compiled)
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
                f"attn_identity saw no call of torch's scaled_dot_product_attention in {self.name}: another attention "
                f"backend is active. Use model.set_attention_backend('native'), or part='block'"
            )
        return out

    def _run(self, mode: _IdentityMode, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block in the mode, and leave neither the mode nor another backend behind, whatever interrupts it."""
        override = TorchAttention(self.module, self.name)
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


class _IdentityMode(TorchFunctionMode):
    """Rewrites scaled_dot_product_attention: video tokens get their own value, only text queries are attended."""

    def __init__(self, video: int, text_first: int | None, tracing: bool) -> None:
        super().__init__()
        self.tracing = tracing
        self.video = video
        self.start = text_first or 0
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
        self.hits += 1
        length = query.shape[-2]
        start = self.start if length > self.video else 0
        end = start + self.video
        if key.shape[-2] != length:
            raise SkipError(
                f"attn_identity is about self-attention, where queries and keys are the same tokens; a block has "
                f"{length} queries and {key.shape[-2]} keys of something else, such as an IP-Adapter's picture: take "
                f"that away (pipe.unload_ip_adapter()), or use part='attn' or 'block'"
            )
        if length < self.video:
            raise SkipError(
                f"attn_identity expected self-attention over {self.video} tokens and text; got {length} tokens: this "
                f"attention sees a part of them. Use part='attn' or 'block'"
            )
        out = torch.empty_like(value)
        out[..., start:end, :] = value[..., start:end, :]
        for text in (slice(0, start), slice(end, length)):
            if text.start < text.stop:
                mask = given.get("attn_mask")
                if mask is not None and mask.shape[-2] == length:
                    mask = mask[..., text, :]
                out[..., text, :] = F.scaled_dot_product_attention(
                    query[..., text, :], key, value, **(given | {"attn_mask": mask})
                )
        return out
