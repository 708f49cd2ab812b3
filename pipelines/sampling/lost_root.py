"""Lost root: the denoiser's forward was replaced during the guidance, so that its calls do not come by any more."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from skipguide.active import ActivePlan, Call, active_plans, end_everywhere, hold_everywhere
from skipguide.gate import gate_of


class RootNotice:
    """Stands at a block of the denoiser, and notices a call of it outside of a pass that the denoiser's gate has seen.

    Args:
        model: the denoiser, whose gate and whose block's gate are installed.
        block: the first of its blocks.
    """

    def __init__(self, model: nn.Module, block: nn.Module) -> None:
        self.gate = gate_of(model)
        self.place = gate_of(block)

    def begin(self) -> None:
        """Stand there."""
        hold_everywhere(self.place, self)

    def end(self) -> None:
        """Stand there no more; a second time nothing happens."""
        end_everywhere(self.place, self)

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block.

        Raises:
            LostGateError: if the denoiser's gate was replaced: guidance would silently end.
        """
        if torch.compiler.is_compiling() or any(each.batch for each in active_plans()) or self.gate.reachable():
            return call(*args, **kwargs)
        raise self.gate.lost()
