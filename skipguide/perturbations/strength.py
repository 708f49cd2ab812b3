"""Strength: a part of a block is not left out but scaled, between the plain block and the block without it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from skipguide.active import ActivePlan, Call, Intervention
from skipguide.arguments import Arguments, sequence_like
from skipguide.spec import Sublayer


def towards(plain: Any, weak: Any, strength: float) -> Any:
    """Results between two others: `plain` at 0, `weak` at 1; what only one of them has is the plain one's.

    Example:
        >>> towards(torch.tensor([1.0]), torch.tensor([3.0]), 0.25)
        tensor([1.5000])
    """
    if isinstance(plain, Tensor) and isinstance(weak, Tensor):
        return torch.lerp(plain, weak.to(plain.dtype), strength)
    if isinstance(plain, (tuple, list)) and isinstance(weak, (tuple, list)):
        return sequence_like(plain, (towards(a, b, strength) for a, b in zip(plain, weak, strict=True)))
    return plain


class Between:
    """A module's results between its own and those of another intervention."""

    __slots__ = ("intervention", "strength")

    def __init__(self, intervention: Intervention, strength: float) -> None:
        self.intervention = intervention
        self.strength = strength

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run both."""
        weak = self.intervention(plan, call, args, kwargs)
        return towards(call(*args, **kwargs), weak, self.strength)


class ScaledBranch:
    """A sublayer's residual contribution is scaled by 1 - strength.

    Args:
        module: the sublayer, or what follows it where its own output is not the contribution.
        sublayer: its description.
        strength: above 0, below 1.
    """

    __slots__ = ("arguments", "residual", "strength")

    def __init__(self, module: nn.Module, sublayer: Sublayer, strength: float) -> None:
        self.arguments = Arguments(module)
        self.residual = sublayer.outputs[0] if sublayer.inside else None
        self.strength = strength

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the sublayer, and scale what it adds."""
        out = call(*args, **kwargs)
        if self.residual is not None:  # the sublayer adds the residual itself
            return towards(out, self.arguments.get(self.residual, args, kwargs), self.strength)
        return self._scaled(out)

    def _scaled(self, out: Any) -> Any:
        if isinstance(out, Tensor):
            return out * (1 - self.strength)
        if isinstance(out, (tuple, list)):
            return sequence_like(out, (self._scaled(each) for each in out))
        return out
