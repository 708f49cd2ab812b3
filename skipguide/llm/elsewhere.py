"""Elsewhere: which sublayer plan holds in this thread or task, and the passes that one does not reach."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from skipguide.active import ActivePlan, Call, active_at, everywhere_at
from skipguide.errors import SkipError
from skipguide.gate import Gate, gate_of
from skipguide.llm.decoder_pass import DecoderPass
from skipguide.llm.sublayers import SublayerMap

logger = logging.getLogger(__name__)


class _Applied(Protocol):
    """What is asked of an applied plan."""

    _root: Gate
    _everywhere: bool
    _drafter: bool
    _elsewhere: int
    _pass: DecoderPass

    @property
    def handle(self) -> Any:
        """What the user was given."""

    def running(self) -> AbstractContextManager[Any]:
        """Let the plan hold in this thread."""


class OtherThreads:
    """At the decoder, in all threads: where the plan does not hold, enter it (`everywhere`) or notice the pass.

    The first such pass is said at once, and not at the end: who generates in a thread of a streamer or a server
    would wait for a text of the whole model. A drafter's plan is silent: around it, the whole model runs on purpose.
    """

    def __init__(self, applied: _Applied) -> None:
        self.applied = applied

    @property
    def handle(self) -> Any:
        """What the user holds, or had."""
        return self.applied.handle

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One pass of the decoder."""
        applied = self.applied
        if active_at(applied._root, DecoderPass) is None:
            if applied._everywhere:
                with applied.running():
                    return call(*args, **kwargs)
            applied._elsewhere += 1
            if applied._elsewhere == 1 and not (applied._drafter or torch.compiler.is_compiling()):
                logger.warning(
                    "%s ran whole in a thread that the plan does not reach: it was applied in another one, without "
                    "everywhere=True. Apply it with everywhere=True, or run `with applied.running():` in this thread",
                    type(applied._root.module).__name__,
                )
        return call(*args, **kwargs)


def plan_that_holds(root: Gate) -> DecoderPass | None:
    """The sublayer plan that holds in this thread or task, also by holding everywhere; None without one.

    Args:
        root: the gate of the model's decoder.
    """
    if (found := active_at(root, DecoderPass)) is not None:
        return found[1]
    return next((each.applied._pass for each in everywhere_at(root, OtherThreads) if each.applied._everywhere), None)


def refuse_second(root: Gate) -> None:
    """Refuse a plan where another one holds, or waits for its statistics.

    Args:
        root: the gate of the model's decoder.
    """
    if plan_that_holds(root) is not None:
        raise SkipError(
            "a sublayer plan is applied to this model already: remove it first (skipguide.remove_from(model) does, "
            "where its handle is gone), or make one plan of the two"
        )


def refuse_skipping(sublayers: SublayerMap) -> None:
    """Refuse to measure a model that sublayers are left out of.

    Raises:
        SkipError: if a plan is applied to it, not empty and enabled.
    """
    found = plan_that_holds(gate_of(sublayers.decoder))
    if found is not None and found.state.enabled and not found.state.plan.empty:
        raise SkipError(
            "sublayers are left out of this model (AdaSkip, UnifiedSkip or a plan is applied), and only the whole "
            "model can be measured: remove that first"
        )
