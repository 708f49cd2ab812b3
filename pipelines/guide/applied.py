"""Applied guide: the handle on a guider that is in force on a pipeline."""

from __future__ import annotations

from typing import Any

from torch import nn

from skipguide.pipelines.applied import AppliedGuidance
from skipguide.pipelines.guide.interceptor import GuideInterceptor
from skipguide.pipelines.guide.run import GuiderRun
from skipguide.pipelines.registry.described import PipelineSpec
from skipguide.pipelines.sampling.finite_watch import FiniteWatch
from skipguide.pipelines.sampling.ledger import GuidanceStats
from skipguide.pipelines.sampling.pipeline_call import PipelineCall
from skipguide.shown import Row


class AppliedGuide(AppliedGuidance):
    """A guider in force on a pipeline. Leave the `with` block or call `remove()` to end it.

    Attributes:
        stats: passes, blocks and seconds so far, and the delivery.
        layers: denoiser -> blocks that some pass is weaker in.
        settings: the `Guide`.
    """

    _name = "this guide"

    def __init__(
        self, guide: Any, pipe: Any, spec: PipelineSpec, names: list[str], weak_model: nn.Module | None = None
    ) -> None:
        self.settings: Any = guide
        self.stats = GuidanceStats(delivery="solve")
        state, self._watch, run = PipelineCall(), FiniteWatch(), GuiderRun(guide.guider, spec)
        made = [
            GuideInterceptor(run, pipe, spec, name, state, self.stats, self._watch, guide.prefix_reuse, weak_model)
            for name in names
        ]
        self.layers = {each.denoiser: each.layers for each in made}
        self._hold(pipe, made)

    def _heading(self) -> str:
        return f"Guide ({self._where}): {self.stats}"

    def _rows(self) -> list[Row]:
        name = type(self.settings.guider).__name__
        return [("denoiser", "guider", "layers"), *((each, name, layers) for each, layers in self.layers.items())]
