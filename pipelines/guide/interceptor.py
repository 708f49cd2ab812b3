"""GuideInterceptor: runs the passes that a guider of diffusers asks for, and delivers what it makes of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from skipguide.active import Call
from skipguide.arguments import batch_size
from skipguide.blocks import find_blocks
from skipguide.errors import SkipError
from skipguide.pipelines.guide.passes import UNCOND, plans, weakened
from skipguide.pipelines.guide.run import GuiderRun
from skipguide.pipelines.registry.described import PipelineSpec
from skipguide.pipelines.sampling.finite_watch import FiniteWatch
from skipguide.pipelines.sampling.interceptor import Interceptor
from skipguide.pipelines.sampling.ledger import GuidanceStats
from skipguide.pipelines.sampling.passes import DenoiserPasses
from skipguide.pipelines.sampling.pipeline_call import PipelineCall
from skipguide.pipelines.sampling.predictions import check_effect, first, widened, with_first
from skipguide.pipelines.sampling.row_inputs import half_of
from skipguide.pipelines.sampling.schedule import GuidanceSchedule
from skipguide.pipelines.sampling.step_passes import Skipped, StepPasses
from skipguide.pipelines.settings import GuidanceSettings
from skipguide.plan import SkipPlan
from skipguide.skipper import Skipper

_NOTHING = GuidanceSettings(scale=0.0)  # no skip guidance of ours


class WholePasses(DenoiserPasses):
    """The forwards of a denoiser whose blocks are left as they are: a guider's own hooks may stand there."""

    def _pass(
        self,
        skipper: Skipper,
        call: Call,
        args: Any,
        kwargs: Any,
        clips: int,
        counted: int,
        planned: int,
        branch: str = "",
    ) -> Any:
        args, kwargs = self._arguments.own(self.bare.map.spec.consumed, args, kwargs)
        out = call(*args, **kwargs)
        self.enter(counted, planned)
        return out


class GuideInterceptor(Interceptor):
    """A guider at one denoiser of one pipeline.

    Where everything that the guider weakens is known as plans, a weakened pass starts at its first weakened block.
    Elsewhere (`plans` is None) each of its passes runs whole and alone, with the guider's own hooks.
    """

    def __init__(
        self,
        run: GuiderRun,
        pipe: Any,
        spec: PipelineSpec,
        denoiser: str,
        state: PipelineCall,
        stats: GuidanceStats,
        watch: FiniteWatch,
        reuse: bool = True,
        weak_model: nn.Module | None = None,
    ) -> None:
        blocks = find_blocks(getattr(pipe, denoiser))
        super().__init__(
            _NOTHING, pipe, spec, denoiser, GuidanceSchedule(_NOTHING, (), blocks), state, stats, None, watch
        )
        self.outputs = self.delivery.outputs  # what the guider makes has those of the conditional prediction
        self.run = run
        self.weak_model = weak_model
        guider = run.guiders[0]
        found: dict[str, SkipPlan] | None = {} if weak_model is not None else plans(guider, blocks)
        self.plans = found or {}
        self.hooked = found is None
        self.combines_only = weak_model is None and not weakened(guider)
        self.works = True
        kind = DenoiserPasses if self.plans else WholePasses
        self.passes = kind(self.model, reuse, stats, bool(self.plans))
        self.names: tuple[str, ...] = ()
        self._forget()

    def _forget(self) -> None:
        """Let go of what the conditional call of a step left for the unconditional one."""
        self._found: dict[str, Tensor] = {}
        self._cond_call: tuple[Call, Any, Any] | None = None

    def install(self) -> None:
        """Put the gates in place; on blocks only where plans say what happens there."""
        self.works = bool(self.plans)
        super().install()
        self.works = True

    def remove(self) -> None:
        """Take everything away again."""
        super().remove()
        self._forget()

    def _guided(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return super()._guided(call, args, kwargs)
        except BaseException:
            self._forget()
            raise

    # -- the passes of a step -----------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Ask the guider for the passes of this step."""
        state = self.state
        if self.passes.cache is not None and not self.combines_only:
            raise SkipError(
                f"pipe.{self.denoiser} has {self.passes.cache} enabled, which would mix the passes that "
                f"{self.run.name} weakens with the others: call pipe.{self.denoiser}.disable_cache() first"
            )
        self.names = self.run.begin(state.step, state.steps, state.timesteps[state.start + state.step])

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks that some pass is weaker in, as plans say."""
        return tuple(sorted({layer for plan in self.plans.values() for layer in plan.layers}))

    @property
    def _needs_uncond(self) -> bool:
        return UNCOND in self.names

    @property
    def _alone(self) -> bool:
        """Whether the unconditional pass is not the denoiser's plain one, and is made apart from the conditional."""
        return self._needs_uncond and (self.hooked or self.weak_model is not None)

    def _passive(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.native.meet(kwargs)
        return super()._passive(call, args, kwargs)

    def _refuse_without_cfg(self) -> None:
        """A weak model, or layers that the unconditional pass is without, make up for the pass that is not there."""

    def _steps(self) -> StepPasses | None:
        """The weakened passes of this step on the conditional inputs, with plans."""
        wanted = [plan for name, plan in self.plans.items() if name in self.names and name != UNCOND]
        return self.passes.prepared(wanted) if wanted else None

    def _run_skipped(
        self, step: StepPasses | None, call: Call, mine: Any, rows: slice, batch: int
    ) -> dict[str, Tensor]:
        """Weakened predictions by name, from plans."""
        if step is None:
            return {}
        found: Skipped = self.passes.skipped(step, call, mine[0], mine[1], rows, batch)
        return {name: found[plan] for name, plan in self.plans.items() if plan in found}

    def _weak(self, call: Call, args: Any, kwargs: Any) -> Tensor:
        """The pass in the unconditional one's place: of the weak model, or with the guider's hooks."""
        clips = batch_size(args, kwargs)
        if self.weak_model is not None:
            self.passes.enter(1, ran=0, passes=0)
            outputs = self.delivery.outputs
            return first((self.weak_model if outputs is None else outputs.around(self.weak_model))(*args, **kwargs))
        return first(self._whole(call, args, kwargs, clips))

    def _whole(self, call: Call, args: Any, kwargs: Any, clips: int, counted: int = 1) -> Any:
        """A pass with whatever hooks the guider puts on for it."""
        if not self.hooked:
            return self.passes.plain(call, args, kwargs, clips, counted=counted, ran=1)
        try:
            self.run.enter(self.model)
            return self.passes.plain(call, args, kwargs, clips, counted=counted, ran=1)
        finally:
            self.run.leave(self.model)

    def _rest(self, call: Call, args: Any, kwargs: Any) -> dict[str, Tensor]:
        """Weakened predictions by name, of passes with the guider's hooks on the conditional inputs."""
        left = [name for name in self.names if name not in ("pred_cond", UNCOND)] if self.hooked else []
        return {name: first(self._whole(call, args, kwargs, batch_size(args, kwargs), 0)) for name in left}

    # -- what comes of them -------------------------------------------------------------------------------------

    def _result(self, found: dict[str, Tensor], kwargs: dict[str, Any]) -> Tensor:
        """What the guider makes of the predictions of a step."""
        if missing := [name for name in self.names if name not in found]:
            self._refuse(missing)
        c = found["pred_cond"]
        for name, prediction in found.items():
            self.watch.see("skipped" if name in self.plans else "plain", prediction, self.state.step)
            if name in self.plans and name != UNCOND and name not in self.state.checked:
                check_effect(c, prediction, self.plans[name])
                self.state.checked.add(name)
        wide = {name: widened(found[name]) for name in self.names}
        return self.run.result(wide, kwargs, self.delivery.modalities)

    def _refuse(self, missing: list[str]) -> None:
        raise SkipError(
            f"{self.run.name} needs {', '.join(missing)}, and this run of {type(self.pipe).__name__} makes no "
            f"unconditional pass: turn its CFG on (a scale above 1, which then has no other effect, and a negative "
            f"prompt where it wants one), or set the guider's guidance_scale to 1"
        )

    # -- the pipeline's calls -----------------------------------------------------------------------------------

    def _both(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call with the rows [uncond, cond]."""
        batch, passes = batch_size(args, kwargs), self.passes
        half = half_of(batch)
        self._begin()
        rows = slice(half, batch)
        step = self._steps()
        if self._needs_uncond and not self._alone:
            if (weak := self.plans.get(UNCOND)) is not None:
                out = passes.skipped_inside(weak, half, call, args, kwargs, half)
            else:
                out = passes.plain(call, args, kwargs, half, step=step, rows=rows, counted=2)
            both = first(out)
            u, c = both[:half], both[half:]
            mine = passes.rows(args, kwargs, rows, batch) if step is not None else (args, kwargs)
            found = {"pred_cond": c, UNCOND: u} | self._run_skipped(step, call, mine, rows, batch)
            y = self._result(found, mine[1])
            return with_first(out, torch.cat(self.delivery.given(y, c, self.state)))
        mine, here = passes.rows(args, kwargs, rows, batch), slice(0, half)
        out, found = self._lone(call, mine, here, half, counted=1 if self._alone else 2)
        c = found["pred_cond"]
        if self._alone:
            other = passes.rows(args, kwargs, slice(0, half), batch)
            found[UNCOND] = self._weak(call, *other)
        y = self._result(found | self._rest(call, *mine), mine[1])
        return with_first(out, torch.cat(self.delivery.given(y, c, self.state)))

    def _lone(self, call: Call, mine: Any, rows: slice, clips: int, counted: int = 1) -> tuple[Any, dict[str, Tensor]]:
        """The conditional pass alone, and those that weaken it by plans."""
        if self.hooked:
            out = self._whole(call, mine[0], mine[1], clips, counted)
            return out, {"pred_cond": first(out)}
        step = self._steps()
        out = self.passes.plain(call, mine[0], mine[1], clips, step=step, rows=rows, counted=counted, ran=1)
        return out, {"pred_cond": first(out)} | self._run_skipped(step, call, mine, rows, clips)

    def _only(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The one call of a run without CFG."""
        self._begin()
        self.delivery.refuse_rescaling()
        batch = batch_size(args, kwargs)
        if self._needs_uncond and self.weak_model is None and UNCOND not in self.plans:
            self._refuse([UNCOND])
        if (weak := self.plans.get(UNCOND)) is not None and self._needs_uncond:
            step = self.passes.prepared([weak])
            out = self.passes.plain(call, args, kwargs, batch, step=step, rows=slice(0, batch))
            k = self._run_skipped(step, call, (args, kwargs), slice(0, batch), batch)
            found = {"pred_cond": first(out)} | k
        else:
            out, found = self._lone(call, (args, kwargs), slice(0, batch), batch)
            if self.weak_model is not None and self._needs_uncond:
                found[UNCOND] = self._weak(call, args, kwargs)
            found |= self._rest(call, args, kwargs)
        c = found["pred_cond"]
        y = self._result(found, kwargs)
        self.state.extra = y - c if self.spec.passive else None
        return with_first(out, self.delivery.delivered(y, c))

    def _cond(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The conditional call of a step with two of them; it comes first."""
        self._begin()
        batch, state = batch_size(args, kwargs), self.state
        out, found = self._lone(call, (args, kwargs), slice(0, batch), batch)
        if not self._needs_uncond:
            y = self._result(found | self._rest(call, args, kwargs), kwargs)
            state.held = with_first(out, self.delivery.delivered(y, first(out)))
            return state.held
        if self.delivery.weightless():
            raise SkipError(
                f"{type(self.pipe).__name__} has a CFG scale of 1 here, so its unconditional call comes when nothing "
                f"can be changed any more: set the scale above 1, it has no other effect under {self.run.name}"
            )
        state.cond, self._found = first(out), found
        # a mapping of further arguments may be filled anew for the unconditional call (IP-Adapters)
        kept = {name: dict(value) if isinstance(value, dict) else value for name, value in kwargs.items()}
        self._cond_call = (call, args, kept) if self.hooked else None
        return out

    def _uncond(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The unconditional call of a step with two of them."""
        state, batch = self.state, batch_size(args, kwargs)
        held, state.held = state.held, None
        if held is not None:
            self.passes.enter(1, ran=0, passes=0)
            return held
        if (c := state.cond) is None:
            raise SkipError(
                "the unconditional call came before the conditional one; this pipeline is not driven as described"
            )
        out: Any
        if self.weak_model is not None:
            out = (self._weak(call, args, kwargs),)
        elif (weak := self.plans.get(UNCOND)) is not None:
            out = self.passes.skipped_inside(weak, 0, call, args, kwargs, batch, counted=1)
        else:
            out = self._whole(call, args, kwargs, batch)
        u, state.cond = first(out), None
        found, self._found = self._found | {UNCOND: u}, {}
        if self._cond_call is not None:
            found |= self._rest(*self._cond_call)
            self._cond_call = None
        y = self._result(found, kwargs)
        return with_first(out, self.delivery.given_uncond(y, c))
