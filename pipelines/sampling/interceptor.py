"""Interceptor: handles the denoiser's calls during `pipe(...)` so that the pipeline's own CFG yields our guidance.

The pipeline is not changed. What holds at a step comes from the schedule, how skipped predictions are used from the
formula, the forwards are made by `DenoiserPasses`, and `Delivery` says what each branch has to return for the
pipeline's arithmetic to arrive at the wanted result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from skipguide.active import ActivePlan, Call, end_everywhere, hold_everywhere
from skipguide.arguments import batch_size
from skipguide.errors import SkipError
from skipguide.gate import gate_of
from skipguide.hosts.cache_contexts import ContextNames
from skipguide.hosts.compilation import untraced
from skipguide.pipelines.registry.described import PipelineSpec, described_loop
from skipguide.pipelines.sampling.branch_parallel import BranchParallelPasses
from skipguide.pipelines.sampling.caches import admit_cache
from skipguide.pipelines.sampling.call_stack import is_called_by, is_running
from skipguide.pipelines.sampling.delivery import Delivery
from skipguide.pipelines.sampling.directions import Directions
from skipguide.pipelines.sampling.finite_watch import FiniteWatch
from skipguide.pipelines.sampling.kept_variances import KeptVariances
from skipguide.pipelines.sampling.last_difference import LastDifference
from skipguide.pipelines.sampling.ledger import GuidanceStats
from skipguide.pipelines.sampling.lost_root import RootNotice
from skipguide.pipelines.sampling.native_pass import NativePass
from skipguide.pipelines.sampling.passes import DenoiserPasses
from skipguide.pipelines.sampling.pipeline_call import PipelineCall
from skipguide.pipelines.sampling.predictions import first, with_first
from skipguide.pipelines.sampling.row_inputs import half_of
from skipguide.pipelines.sampling.schedule import GuidanceSchedule, StepPlan
from skipguide.pipelines.sampling.step_passes import Skipped, StepPasses
from skipguide.pipelines.settings import GuidanceSettings


class Interceptor:
    """Guidance at one denoiser of one pipeline."""

    def __init__(
        self,
        settings: GuidanceSettings,
        pipe: Any,
        spec: PipelineSpec,
        denoiser: str,
        schedule: GuidanceSchedule,
        state: PipelineCall,
        stats: GuidanceStats,
        group: Any = None,
        watch: FiniteWatch | None = None,
        over_native: bool = False,
    ) -> None:
        self.settings = settings
        self.rule = settings.rule
        self.pipe = pipe
        self.spec = spec
        self.loop = described_loop(pipe)
        self.denoiser = denoiser
        self.model: nn.Module = getattr(pipe, denoiser)
        self.native = NativePass(pipe, spec, self.model, over_native)
        self.schedule = schedule
        self.state = state
        self.stats = stats
        # a guidance that never acts touches no block: only the model's own gate is installed, to count the passes
        own_cfg = schedule.times.own_cfg or settings.zero_star or settings.guidance_scale is not None
        self.works = bool(schedule.groups) or own_cfg
        reuse, touch = settings.prefix_reuse, self.works
        self.passes: DenoiserPasses
        if group is None:
            self.passes = DenoiserPasses(self.model, reuse, stats, touch, settings.tail, settings.schedule)
        else:
            self.passes = BranchParallelPasses(self.model, reuse, stats, touch, group)
        self._untraced = untraced(Interceptor._handle)  # of a denoiser that is wrapped by torch.compile from now on
        self.notice = RootNotice(self.model, self.passes.bare.map[0].module)
        self.delivery = Delivery(settings, pipe, spec, denoiser, state, stats)
        self.outputs = KeptVariances() if spec.variances else self.delivery.outputs
        self.watch = FiniteWatch() if watch is None else watch
        self.directions = Directions(settings, denoiser, self.delivery, state, stats, self.watch)
        self.difference = LastDifference(denoiser, settings.reuses_cfg, state, stats)
        self.step_plan = StepPlan()
        self.handle: Any = None  # what the user was given: it can be had back from here
        self._met: Any = None  # timesteps of the pipeline call whose cache and number of steps were checked

    # -- installation -------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Put the gates in place and follow the names of cache contexts."""
        self.passes.install()
        hold_everywhere(gate_of(self.model), self)
        if self.works and not self.passes.count.unseen:  # a graph would be compiled anew for it
            self.notice.begin()
        ContextNames.listen(self.model, self, gate_of(self.model).move_in_front)

    def remove(self) -> None:
        """Take everything away again."""
        end_everywhere(gate_of(self.model), self)
        self.notice.end()
        ContextNames.leave(self.model, self)
        if -1 < self.state.step < self.state.steps - 1 and not is_running(self.pipe):
            self.passes.states.reset()  # the last run was broken off, and nobody else clears up after it
        self.passes.remove()
        self.state.release()

    # -- one call of the denoiser -------------------------------------------------------------------------------

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the denoiser by the pipeline: a branch of a step, or both."""
        return self._untraced(self, call, args, kwargs)

    def _handle(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not is_called_by(self.pipe, self.model, self.loop):
            return call(*args, **kwargs)
        self.state.refuse_other_threads(self.pipe)
        if self.schedule.groups:
            self.native.meet(kwargs)
        outputs = self.outputs if self.works else None
        guide = self._passive if self.spec.is_passive(kwargs) else self._guided
        if outputs is None:
            return guide(call, args, kwargs)
        return outputs.apart(guide(outputs.around(call), args, kwargs))

    def _passive(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A further pass of the pipeline's own: the other branches of this step may have been shifted."""
        out, extra = call(*args, **kwargs), self.state.extra
        if extra is not None:
            out = with_first(out, self.delivery.shifted(first(out), extra))
        if self.works:
            self.watch.see("guided", first(out), self.state.step)
        return out

    def _guided(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            branch = self.state.enter(self.pipe, self.spec, ContextNames.name(self.model))
            if not self.works:
                self.passes.enter(2 if branch == "both" else 1)
                return call(*args, **kwargs)
            state = self.state
            self.watch.begin(state.timesteps)
            state.shape = tuple(getattr(kwargs.get("hidden_states"), "shape", ())[1:])
            if state.timesteps is not self._met:  # a cache can come and go between calls
                self._met = state.timesteps
                self.schedule.refuse_idle(state.steps)
                cache = admit_cache(self.pipe, self.denoiser, self.model, self.settings, self.schedule)
                self.passes.move_in_front(getattr(self.pipe, self.denoiser))
                if self.passes.count.unseen:
                    self.notice.end()
                self.passes.set_cache(cache)
            self.passes.branch = branch
            sigma = state.sigma(self.pipe) if self.schedule.needs_sigma else None
            self.step_plan = self.schedule.at(state.step, state.steps, sigma, cfg=branch != "only")
            self.delivery.now = self.step_plan
            self.passes.choices.begin(state.step)
            if branch == "only" or (branch == "cond" and state.lone_cond):
                self._refuse_without_cfg()
            swapped = branch == "both" and self.spec.cond_first
            out = getattr(self, "_both_swapped" if swapped else f"_{branch}")(call, args, kwargs)
            self.watch.see("guided", first(out), self.state.step)
            if state.step == state.steps - 1 and (branch != "cond" or self.delivery.w() is None):
                self.watch.settle()
                self.delivery.rounding.settle()
                if branch != "cond":
                    self.passes.forget()
                    state.difference = None
            return out
        except BaseException:
            self.passes.fail()
            self.state.release()
            self.watch.forget()
            raise

    def _both_swapped(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call with the rows [cond, uncond], as [uncond, cond] and back."""
        batch = batch_size(args, kwargs)
        order = torch.arange(batch).roll(batch // 2)
        out = self._both(call, *self.passes.rows(args, kwargs, order, batch))
        return with_first(out, first(out)[order.to(first(out).device)])

    def _refuse_without_cfg(self) -> None:
        settings = self.settings
        what = {
            f"formula={settings.formula!r} is about the unconditional pass": self.rule.needs_cfg,
            "cfg_interval says where the unconditional pass is used": settings.cfg_interval is not None,
            "cfg_every says where it is run": settings.cfg_every > 1,
            "schedule has CFG at some step": settings.schedule is not None and settings.schedule.has_cfg,
            "zero_star scales the unconditional prediction": settings.zero_star,
            "guidance_scale is a scale of CFG": settings.guidance_scale is not None,
        }
        for words, asked in what.items():
            if asked:
                raise SkipError(f"{words}, but this run has none: turn CFG on (guidance_scale above 1)")

    def _both(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call with the rows [uncond, cond]."""
        batch, plan, passes, state = batch_size(args, kwargs), self.step_plan, self.passes, self.state
        half = half_of(batch)
        conditional = slice(half, batch)
        if not plan.cfg:  # the conditional rows only, and every branch is their prediction
            mine, rows = passes.rows(args, kwargs, conditional, batch), slice(0, half)
            step = self._prepared(half)
            out = passes.plain(call, mine[0], mine[1], half, step=step, rows=rows, counted=2, ran=1)
            y = self._without_cfg(first(out), self._skipped(step, call, mine, rows, half))
            state.extra = y - first(out) if self.spec.passive else None
            return with_first(out, torch.cat([y, y]))
        step, reused = self._prepared(half), self._reuses_difference(half)
        rows = slice(0, half) if plan.place == "uncond" else conditional
        if reused:
            (args, kwargs), rows, batch = passes.rows(args, kwargs, conditional, batch), slice(0, half), half
            out = passes.plain(call, args, kwargs, half, step=step, rows=rows, counted=2, ran=1)
            u, c = self.difference.uncond(first(out)), first(out)
        else:
            if plan.skips_inside:
                out = passes.skipped_inside(plan.skipped[0].plan, half, call, args, kwargs, half)
            else:
                out = passes.plain(call, args, kwargs, half, step=step, rows=rows, counted=2)
            u, c = first(out).split(half)
            self.difference.keep(u, c)
        u = self.delivery.scaled(u, c)
        if not plan.skipped or plan.skips_inside:
            if plan.w is not None:
                return with_first(out, torch.cat(self.delivery.both(u, c, None, state)))
            own = self.settings.zero_star or reused
            return with_first(out, torch.cat(self.delivery.branches(u, c))) if own else out
        mine = passes.rows(args, kwargs, rows, batch) if step is not None else (args, kwargs)
        delta = self.directions.delta(plan, u, c, self._skipped(step, call, mine, rows, batch))
        if self.delivery.mode() == "shift":
            return with_first(out, torch.cat(self.delivery.both_shifted(u, c, delta, state)))
        return with_first(out, torch.cat(self.delivery.both(u, c, delta, state)))

    def _only(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The one call of a run without CFG."""
        batch = batch_size(args, kwargs)
        step, rows = self._prepared(batch), slice(0, batch)
        out = self.passes.plain(call, args, kwargs, batch, step=step, rows=rows)
        if self.step_plan.skipped:
            self.delivery.refuse_rescaling()
        y = self._without_cfg(first(out), self._skipped(step, call, (args, kwargs), rows, batch))
        self.state.extra = y - first(out) if self.spec.passive else None
        return with_first(out, y)

    def _cond(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The conditional call of a step with two of them; it comes first."""
        batch, plan, state = batch_size(args, kwargs), self.step_plan, self.state
        w = self.delivery.w()
        # without knowledge of w this can only be a call without CFG, whose direction is known at once
        waits = self.rule.waits_for_uncond and w is not None
        if plan.cfg and (not plan.skipped or plan.skips_inside or (waits and plan.place == "uncond")):
            out = self.passes.plain(call, args, kwargs, batch)  # what is skipped follows with u
            state.cond, state.held = first(out), self._held(out)
            return out
        step, rows = self._prepared(batch), slice(0, batch)
        out = self.passes.plain(call, args, kwargs, batch, step=step, rows=rows)
        c, skipped = first(out), self._skipped(step, call, (args, kwargs), rows, batch)
        if not plan.cfg:  # the unconditional call will be answered with the same
            state.held = with_first(out, self._without_cfg(c, skipped))
            return state.held
        state.cond, state.held = c, self._held(out)
        if waits:
            state.skipped = skipped
            return out
        state.delta = self.directions.delta(plan, None, c, skipped)
        if self.delivery.mode() == "shift":
            return with_first(out, self.delivery.shifted(c, state.delta))
        # if an unconditional call follows although w is not known, `need_w` refuses it
        alone = w is None or (plan.w is None and self.delivery.weightless())
        return with_first(out, self.delivery.without_cfg(c, state.delta)) if alone else out

    def _uncond(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The unconditional call of a step with two of them."""
        batch, plan, state = batch_size(args, kwargs), self.step_plan, self.state
        held, state.held = state.held, None
        if not plan.cfg and held is not None:
            self.passes.enter(1, ran=0, passes=0)
            return held
        if (c := state.cond) is None:
            raise SkipError(
                "the unconditional call came before the conditional one; this pipeline is not driven as described"
            )
        rows, here = slice(0, batch), plan.place == "uncond"
        step = self._prepared(batch) if here else None
        if held is not None:
            self.passes.enter(1, ran=0, passes=0)
            out = with_first(held, self.difference.uncond(c))
        elif plan.skips_inside:
            out = self.passes.skipped_inside(plan.skipped[0].plan, 0, call, args, kwargs, batch, counted=1)
        else:
            out = self.passes.plain(call, args, kwargs, batch, step=step, rows=rows)
            self.difference.keep(first(out), c)
        u, state.cond = self.delivery.scaled(first(out), c), None
        if not plan.skipped or plan.skips_inside:
            if plan.w is not None:
                return with_first(out, self.delivery.solved(u, c, None, state))
            own = self.settings.zero_star or held is not None
            return with_first(out, self.delivery.delivered(u, c)) if own else out
        if self.rule.waits_for_uncond:
            skipped = self._skipped(step, call, (args, kwargs), rows, batch) if here else state.skipped
            state.delta, state.skipped = self.directions.delta(plan, u, c, skipped), None
        assert state.delta is not None
        delta, state.delta = state.delta, None
        if self.delivery.mode() == "shift":
            return with_first(out, self.delivery.uncond_shifted(u, c, delta))
        if not self.rule.waits_for_uncond and plan.w is None and self.delivery.weightless():
            return out
        return with_first(out, self.delivery.solved(u, c, delta, state))

    # -- what guidance adds -------------------------------------------------------------------------------------

    def _reuses_difference(self, clips: int) -> bool:
        """Whether u of this step is made of c and the last difference."""
        return self.step_plan.cfg and not self.step_plan.cfg_fresh and self.difference.holds(clips)

    def _held(self, out: Any) -> Any:
        """What the answer to the unconditional call will be made of; None where that call runs."""
        return out if self._reuses_difference(len(first(out))) else None

    def _without_cfg(self, c: Tensor, skipped: Skipped | None) -> Tensor:
        """The prediction of a step without CFG."""
        if not self.step_plan.skipped:
            return c
        return self.delivery.without_cfg(c, self.directions.delta(self.step_plan, None, c, skipped))

    def _prepared(self, clips: int) -> StepPasses | None:
        """The skipped passes of this step; None if there are none, or the last directions are used again."""
        plan = self.step_plan
        if self.directions.held(plan, clips) or not plan.skipped or plan.skips_inside:
            return None
        return self.passes.prepared([each.plan for each in plan.skipped])

    def _skipped(self, step: StepPasses | None, call: Call, mine: Any, rows: slice, batch: int) -> Skipped | None:
        """The skipped predictions of this step; None where the last directions are used again."""
        if step is None:
            return None
        args, kwargs = mine
        return self.passes.skipped(step, call, args, kwargs, rows, batch)
