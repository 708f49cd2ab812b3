"""Attention identity without queries and keys: the values pass (STG-A, arXiv 2411.18664 section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from skipguide.active import ActivePlan, Call
from skipguide.arguments import Arguments
from skipguide.errors import SkipError

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
