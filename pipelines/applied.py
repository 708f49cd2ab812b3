"""Applied guidance: the handle on guidance that is in force on a pipeline."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from skipguide.hosts.wrappers import unwrap
from skipguide.pipelines.handle import PipelineHandle
from skipguide.pipelines.registry.described import PipelineSpec
from skipguide.pipelines.sampling.delivery import solves
from skipguide.pipelines.sampling.finite_watch import FiniteWatch
from skipguide.pipelines.sampling.interceptor import Interceptor
from skipguide.pipelines.sampling.ledger import GuidanceStats
from skipguide.pipelines.sampling.pipeline_call import PipelineCall
from skipguide.pipelines.sampling.schedule import GuidanceSchedule
from skipguide.pipelines.settings import GuidanceSettings
from skipguide.shown import Row, Shown

logger = logging.getLogger(__name__)


class AppliedGuidance(Shown, PipelineHandle):
    """Guidance in force on a pipeline. Leave the `with` block or call `remove()` to end it.

    Attributes:
        stats: passes, blocks and seconds so far, and the delivery.
        layers: denoiser -> blocks skipped in it.
    """

    _name = "this guidance"

    def __init__(
        self,
        settings: GuidanceSettings,
        pipe: Any,
        spec: PipelineSpec,
        schedules: Mapping[str, GuidanceSchedule],
        group: Any = None,
        over_native: bool = False,
    ) -> None:
        self.settings = settings
        self.layers = {name: schedule.layers for name, schedule in schedules.items()}
        self.stats = GuidanceStats(delivery="solve" if solves(settings) else "shift")
        state, self._watch = PipelineCall(), FiniteWatch()
        standing = [
            Interceptor(settings, pipe, spec, name, schedule, state, self.stats, group, self._watch, over_native)
            for name, schedule in schedules.items()
        ]
        self._hold(pipe, standing)

    @property
    def delivery(self) -> str:
        """How the guidance reaches the pipeline: `"shift"` or `"solve"`."""
        return self.stats.delivery

    def _heading(self) -> str:
        return f"Skip guidance ({self._where}): {self.stats}"

    def _rows(self) -> list[Row]:
        same = self.settings
        found = [(name, layers, same.part, same.scale, same.formula) for name, layers in self.layers.items()]
        return [("denoiser", "layers", "part", "scale", "formula"), *found]

    def _forget(self) -> None:
        self._watch.forget()

    def remove(self) -> None:
        """End the guidance; nothing of it is left on the pipeline. A second call does nothing.

        Raises:
            SkipError: afterwards, if the last call was interrupted and a prediction in it was not finite.
        """
        super().remove()
        self._watch.settle("the last call, which was interrupted")

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        """End the guidance."""
        try:
            exchanged = [each.denoiser for each in self._installed if _is_exchanged(self._pipe, each)]
            if kind is not None:
                self._forget()
            self.remove()
        except BaseException:  # Ctrl-C: what was broken off is done again
            self._forget()
            self.remove()
            raise
        if kind is not None:
            return
        if exchanged and self.stats.passes:
            logger.warning(
                "pipe.%s was exchanged inside the with block: from then on the pipeline ran without skip guidance. "
                "Apply guidance again after exchanging a denoiser",
                " and pipe.".join(exchanged),
            )
        if self.stats.passes == 0:
            logger.warning(
                "skip guidance was applied, but the denoiser it was applied to was never called: was the pipeline's "
                "denoiser exchanged inside the with block?"
            )


def _is_exchanged(pipe: Any, interceptor: Interceptor) -> bool:
    """Whether the pipeline has another denoiser now; one that was wrapped (torch.compile, PEFT) is the same."""
    now = getattr(pipe, interceptor.denoiser, None)
    return isinstance(now, nn.Module) and unwrap(now) is not unwrap(interceptor.model)
