"""Trajectories: a few runs of a pipeline, and how far a schedule takes their latents from where the full run ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from skipguide.blocks import find_blocks
from skipguide.config import as_whole
from skipguide.errors import NoEffectError, SkipError
from skipguide.pipelines.calibration import own_call
from skipguide.pipelines.pass_schedule import PassSchedule
from skipguide.pipelines.stg import SpatiotemporalSkipGuidance


class Trajectories:
    """Runs that are made again and again, each from its own noise.

    Args:
        pipe: the pipeline.
        calls: arguments of its call, a mapping for each run; `seed` says the noise.
        guidance: what the full runs are guided by.

    Attributes:
        steps: of a run.
        cfg: whether the runs have CFG.
        runs: how many times the pipeline was called.

    Raises:
        SkipError: for calls that are none, that have a generator, or differ in their steps.
    """

    def __init__(self, pipe: Any, calls: Sequence[Mapping[str, Any]], guidance: SpatiotemporalSkipGuidance) -> None:
        if isinstance(calls, (str, bytes, Mapping)) or not calls or not all(isinstance(c, Mapping) for c in calls):
            raise SkipError('calls is a list of arguments of the pipeline, such as [{"prompt": "a tram", "seed": 1}]')
        if any("generator" in call for call in calls):
            raise SkipError("a generator goes on from run to run: say seed=..., which begins each one anew")
        self.pipe, self.guidance, self.runs = pipe, guidance, 0
        self.calls = [own_call(pipe) | {"output_type": "latent", "seed": n} | dict(c) for n, c in enumerate(calls)]
        self.steps, self.cfg = 0, False
        self.whole = [self._run(guidance, call, first=True) for call in self.calls]

    def _run(self, guidance: SpatiotemporalSkipGuidance, call: Mapping[str, Any], first: bool = False) -> Tensor:
        own = dict(call)
        generator = torch.Generator("cpu").manual_seed(as_whole("seed", own.pop("seed"), None))
        with guidance.apply(self.pipe) as applied:
            out = self.pipe(generator=generator, **own)[0]
            standing: Any = applied._parts[0]
            steps, model, stats = standing.state.steps, standing.model, applied.stats
        self.runs += 1
        if not isinstance(out, Tensor):
            raise SkipError(
                f"expected latents of {type(self.pipe).__name__} with output_type={own['output_type']!r}; got a "
                f"{type(out).__name__}: say an output_type that is a tensor"
            )
        if first:
            if self.steps not in (0, steps):
                raise SkipError(f"a schedule is for one number of steps; the calls have {self.steps} and {steps}")
            self.steps, self.cfg = steps, stats.blocks_plain > steps * len(find_blocks(model))
        return out.float()

    def damage(self, schedule: PassSchedule) -> float:
        """Squared distance of the final latents from those of the full runs, relative to these, averaged.

        It is infinite where the skipped pass has no effect any more, as its layers stand still in every pass.
        """
        guidance, found = self.guidance.scheduled(schedule), 0.0
        for call, whole in zip(self.calls, self.whole, strict=True):
            try:
                apart = (self._run(guidance, call) - whole).square().sum() / whole.square().sum().clamp_min(1e-30)
            except NoEffectError:
                return math.inf
            found += float(apart) / len(self.calls)
        return math.inf if math.isnan(found) else found

    def blocks(self, schedule: PassSchedule) -> float:
        """The blocks that a run with a schedule takes."""
        cost = self.guidance.scheduled(schedule).cost(self.pipe, guidance=self.cfg)
        return cost.blocks_per_step * self.steps
