"""Model pass: what happens at the model itself when a pass of it begins and ends under a plan."""

from __future__ import annotations

from typing import Any

import torch

from skipguide.active import ActivePlan, Call, active_plans
from skipguide.arguments import batch_size
from skipguide.recomputation import follow


class ModelPass:
    """The root intervention of a plan: opens a pass of the model, and closes it however it ends.

    It is made for many passes, in many threads: what belongs to one pass is kept on the `ActivePlan` that is given.
    """

    __slots__ = ()

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the pass."""
        if torch.compiler.is_compiling():
            self.open(plan, args, kwargs)
            args, kwargs = self.own(args, kwargs)
            return call(*args, **kwargs)
        token = object()
        try:
            now = plan.begin(token)
            try:
                if torch.is_grad_enabled() or (args and getattr(args[0], "requires_grad", False)):
                    now.follow = follow
                    follow(active_plans())
                self.open(now, args, kwargs)
                args, kwargs = self.own(args, kwargs)
                out = call(*args, **kwargs)
            finally:
                self.end(now)
            self.close(now, out)
            return out
        finally:
            try:
                plan.finish(token)
            except BaseException:  # Ctrl-C: what was broken off is done again
                plan.finish(token)
                raise

    def open(self, plan: ActivePlan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model runs, also while it is traced: note the batch, and what this pass is about."""
        plan.batch = batch_size(args, kwargs)

    def own(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call, with copies of what this pass of the model would use up."""
        return args, kwargs

    def end(self, plan: ActivePlan) -> None:
        """After the model ran, or failed: give back what was taken for the pass."""

    def close(self, plan: ActivePlan, out: Any) -> None:
        """After the model ran: enter the pass in the ledger, and check that the plan was followed."""
