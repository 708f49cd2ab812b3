"""Recomputation: what gradient checkpointing runs again in the backward pass follows the plans of its forward pass.

The backward pass may run when the `with` block is over, or in a thread of autograd's own. There the plans do not hold
and the gates are gone: without them the whole model would be differentiated, and the gradients be wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from skipguide.active import ActivePlan, hold_only
from skipguide.gate import Installation, gates_at
from skipguide.hosts.gradient_checkpointing import recomputed_call


class Recomputation:
    """A function that a checkpoint will run again, under the plans as they hold now.

    Args:
        call: the function.
        plans: of the running forward pass.
    """

    def __init__(self, call: Callable[..., Any], plans: tuple[ActivePlan, ...]) -> None:
        self.call = call
        self.plans = tuple(plan.snapshot() for plan in plans if plan.live)
        self.installation = Installation(
            gates_at({key for plan in self.plans for key in (*plan.interventions, *plan.names)})
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it again; what runs is not entered in the ledgers a second time."""
        try:
            self.installation.install()
            with hold_only(self.plans):
                return self.call(*args, **kwargs)
        finally:
            try:
                self.installation.remove()
            except BaseException:  # Ctrl-C: what was broken off is done again
                self.installation.remove()
                raise


def follow(plans: tuple[ActivePlan, ...]) -> None:
    """If a checkpoint surrounds the running call, let its recomputation follow these plans."""
    if (slot := recomputed_call()) is not None:
        holder, name = slot
        if not isinstance(call := getattr(holder, name), Recomputation):
            setattr(holder, name, Recomputation(call, plans))
