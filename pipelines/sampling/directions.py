"""Directions: what skip guidance adds to every branch of a step, made anew or used again, times the scales."""

from __future__ import annotations

from torch import Tensor

from skipguide.pipelines.sampling.delivery import Delivery
from skipguide.pipelines.sampling.finite_watch import FiniteWatch
from skipguide.pipelines.sampling.ledger import GuidanceStats
from skipguide.pipelines.sampling.pipeline_call import PipelineCall
from skipguide.pipelines.sampling.predictions import check_effect, widened
from skipguide.pipelines.sampling.schedule import StepPlan
from skipguide.pipelines.sampling.step_passes import Skipped
from skipguide.pipelines.settings import GuidanceSettings


class Directions:
    """The directions of one denoiser; those that may be used again are kept in the pipeline call's state."""

    def __init__(
        self,
        settings: GuidanceSettings,
        denoiser: str,
        delivery: Delivery,
        state: PipelineCall,
        stats: GuidanceStats,
        watch: FiniteWatch,
    ) -> None:
        self.rule = settings.rule
        self.kept = settings.reuses_skip
        self.over_gaps = self.kept and settings.schedule is not None  # which may go on with them after other steps
        self.denoiser = denoiser
        self.delivery = delivery
        self.state = state
        self.stats = stats
        self.watch = watch

    def _keys(self, plan: StepPlan) -> tuple[str, ...]:
        return (self.denoiser, str(self.state.shape), *(each.key for each in plan.skipped))

    def held(self, plan: StepPlan, clips: int) -> bool:
        """Whether the last directions are used again at this step; they are let go of where nothing is skipped."""
        if not plan.skipped or plan.skips_inside:
            if not self.over_gaps:
                self.state.directions = None
            return False
        old = self.state.directions
        return old is not None and self.state.keys == self._keys(plan) and len(old[0]) == clips and not plan.fresh

    def delta(self, plan: StepPlan, u: Tensor | None, c: Tensor, skipped: Skipped | None) -> Tensor:
        """What guidance adds to every branch of this step.

        Args:
            plan: what holds at it.
            u: the unconditional prediction; None on a step without CFG, or where the direction does not need it.
            c: the conditional prediction.
            skipped: the skipped ones; None uses the last directions again.
        """
        state, rule = self.state, self.rule
        if skipped is not None:
            assert rule.direction is not None
            w = self.delivery.cfg_scale() if rule.needs_w and u is not None else 1.0
            wide = None if u is None else widened(u), widened(c)
            directions = [rule.direction(*wide, skipped[each.plan], w) for each in plan.skipped]
            new = [self.delivery.projected(d, c) for d in directions]
            plain = u if plan.place == "uncond" and u is not None else c
            self.watch.see("plain", plain, state.step)
            for each in plan.skipped:
                self.watch.see("skipped", skipped[each.plan], state.step)
                if each.key not in state.checked:
                    check_effect(plain, skipped[each.plan], each.plan)
                    state.checked.add(each.key)
            if state.directions is not None and state.keys == self._keys(plan) and self.kept:
                self.stats.note_reuse(state.directions, new)
            state.directions, state.keys = new, self._keys(plan)
        assert state.directions is not None
        spread = self.delivery.modalities.spread
        delta, *others = (spread(each.scale) * d for each, d in zip(plan.skipped, state.directions, strict=True))
        delta = sum(others, start=delta)
        if not self.kept:
            state.directions = None
        return delta
