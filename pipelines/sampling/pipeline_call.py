"""State of a pipeline call: which step it is at, and for which branch of its guidance the denoiser is called."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from threading import get_ident
from typing import Any, Literal

import torch
from torch import Tensor

from skipguide.errors import SkipError
from skipguide.pipelines.registry.described import PipelineSpec
from skipguide.pipelines.sampling.call_stack import is_running, look_up
from skipguide.plan import SkipPlan

Branch = Literal["both", "cond", "uncond", "only"]


@dataclass
class PipelineCall:
    """State of one `pipe(...)` call, shared by the denoisers of a pipeline.

    Attributes:
        timesteps: the scheduler's table; every `pipe(...)` call makes a new one, which is how a new call is noticed.
        step: number of the current step, from 0.
        steps: how many there are.
        start: place of the first step in the scheduler's table.
        w: the CFG scale when the call began.
        began: the attributes that hold CFG scales, as they were then.
        branches: denoiser calls in this step so far.
        lone_cond: the step before had a conditional call and no unconditional one.
        cond: the conditional prediction of this step, for the unconditional call after it.
        delta: what guidance adds to both calls of this step.
        skipped: the skipped predictions of this step, where their direction is known after the unconditional call.
        held: the answer to the unconditional call of a step without CFG; where its pass is saved, what it is made of.
        directions: the unscaled directions that guidance added last, while they may be used again.
        keys: what they are the directions of.
        difference: c - u of the last step that computed it, while it may be used again.
        difference_of: what it is the difference of.
        shape: of the video in this call, without its rows: some pipelines work on a part of its frames.
        checked: the skipped passes that were seen to have an effect.
        thread: whose call it is.
        extra: what the branches of this step were shifted by, for the pipeline's own further passes of it.
        foreign: timesteps that another thread gave the scheduler while that call was running.
    """

    timesteps: Any = None
    step: int = -1
    steps: int = 1
    start: int = 0
    w: float = 0.0
    began: dict[str, Any] = field(default_factory=dict)
    branches: int = 0
    lone_cond: bool = False
    cond: Tensor | None = None
    delta: Tensor | None = None
    skipped: dict[SkipPlan, Tensor] | None = None
    held: Any = None
    directions: list[Tensor] | None = None
    keys: tuple[str, ...] = ()
    difference: Tensor | None = None
    difference_of: str = ""
    shape: tuple[int, ...] = ()
    checked: set[str] = field(default_factory=set)
    extra: Tensor | None = None
    thread: int = field(default_factory=get_ident)
    foreign: Any = field(default=None, repr=False)

    def refuse_other_threads(self, pipe: Any) -> None:
        """Refuse a denoiser call of another thread than the one whose `pipe(...)` call this is the state of.

        Another thread may have begun a call of its own, which gave the scheduler new timesteps: then both are refused,
        as the scheduler of the first has lost its place.

        Raises:
            SkipError: saying so.
        """
        now, mine = pipe.scheduler.timesteps, self.thread == get_ident()
        if mine and (self.foreign is None or now is not self.foreign):
            return
        if not mine and (self.timesteps is None or (now is not self.timesteps and not is_running(pipe, self.thread))):
            self.thread = get_ident()  # from here on, not from the first step's end on: another may begin meanwhile
            return
        self.foreign = None if mine or now is self.timesteps else now
        raise SkipError(
            f"two threads run this {type(pipe).__name__} at once, and its scheduler and guidance keep the state of "
            f"one call at a time: wait, or give each thread a pipeline with a scheduler of its own, which may share "
            f"the weights: {type(pipe).__name__}.from_pipe(pipe, scheduler=copy.deepcopy(pipe.scheduler))"
        )

    def release(self) -> None:
        """Let go of the predictions."""
        self.cond = self.delta = self.skipped = self.held = self.directions = self.extra = None
        self.difference = None

    def sigma(self, pipe: Any) -> float:
        """The scheduler's noise level at this step.

        Raises:
            SkipError: if the scheduler does not tell.
        """
        if (steps := self.steps) > len(self.timesteps):
            raise SkipError(
                f"{type(pipe).__name__} gives frames different noise levels ({steps} steps of {len(self.timesteps)} "
                f"levels): use Timetable(..., over='step') instead"
            )
        scheduler, index = pipe.scheduler, self.start + self.step
        if (sigmas := getattr(scheduler, "sigmas", None)) is not None and len(sigmas) > index:
            sigma = float(sigmas[index])
            return 1 - sigma if getattr(scheduler.config, "invert_sigmas", False) else sigma
        if (kept := getattr(scheduler, "alphas_cumprod", None)) is not None:
            share = float(kept[int(self.timesteps[index])])
            return math.sqrt((1 - share) / share)
        raise SkipError(
            f"{type(scheduler).__name__} does not tell its noise levels: use Timetable(..., over='step') instead"
        )

    def enter(self, pipe: Any, spec: PipelineSpec, context: str) -> Branch:
        """Note a call of the denoiser and say for which branch it is.

        Args:
            pipe: the pipeline that calls.
            spec: how it calls.
            context: name of the `cache_context` in force, or empty.
        """
        tells_scale = spec.cfg in ("batched", "two_calls")
        if pipe.scheduler.timesteps is not self.timesteps:
            fresh = PipelineCall(pipe.scheduler.timesteps, w=_largest_scale(pipe, spec) if tells_scale else 0.0)
            for each in fields(self):
                setattr(self, each.name, getattr(fresh, each.name))
            self.began = {name: look_up(pipe, name) for names in spec.scales for name in names}
            self.steps, self.start = _range(pipe, spec)
        self.extra = None
        if spec.cfg == "single":
            branch: Branch = "only"
        elif not tells_scale:
            branch = "uncond" if context.endswith("uncond") else "cond"
        elif not (self._has_scale(pipe, spec) and (not spec.switch or look_up(pipe, spec.switch))):
            branch = "only"
        elif spec.cfg == "batched":
            branch = "both"
        elif context in ("cond", "uncond"):
            branch = "uncond" if context == "uncond" else "cond"
        else:  # no names: the conditional call comes first
            branch = "uncond" if self.branches == 1 else "cond"
        if branch == "uncond":
            self.branches += 1
        else:
            self.lone_cond = branch == "cond" and self.branches == 1
            self.step += 1
            self.branches = 1
            if spec.chunked and self.step == self.steps:
                self.step, self.steps, self.directions, self.difference = 0, pipe._num_timesteps, None, None
        if self.step >= self.steps:
            raise SkipError(
                f"{type(pipe).__name__} has {self.steps} steps, but its denoiser was called for a further one: is it "
                f"called by something that is not a pipeline? Remove the guidance first, or give that a copy"
            )
        return branch

    def _has_scale(self, pipe: Any, spec: PipelineSpec) -> bool:
        """Whether the scale in force says that there is CFG; without one it is left to the switch."""
        if not (spec.scales[0] or spec.joined):
            return True
        return (self.w if "cfg" in spec.kept else _largest_scale(pipe, spec)) + spec.offset > 1


def _range(pipe: Any, spec: PipelineSpec) -> tuple[int, int]:
    """How many steps a call makes, and at which place of the scheduler's table it begins."""
    table = pipe.scheduler.timesteps
    if not spec.timesteps:
        steps = getattr(pipe, "_num_timesteps", None) or len(table)
        return steps, max(len(table) - steps, 0)
    own = look_up(pipe, spec.timesteps)
    steps = len(own)
    early = len(table) > steps and torch.equal(own, table[:steps])  # it leaves the last ones to another pipeline
    return steps, 0 if early else max(len(table) - steps, 0)


def _largest_scale(pipe: Any, spec: PipelineSpec) -> float:
    """The CFG scale that says whether there is CFG; some pipelines have one per frame, or per modality."""
    names = spec.scales[0]
    if names and not any(name.startswith("call.") or hasattr(pipe, name) for name in names):
        raise SkipError(
            f"{type(pipe).__name__} has no {' or '.join(names)}, which says whether there is CFG: this pipeline is not "
            f"driven as described. Describe it with skipguide.pipelines.register_pipeline"
        )
    found = (value for name in names if (value := look_up(pipe, name)) is not None)
    scales = [getattr(pipe, name) for name in spec.joined] or [next(found, 0.0)]
    return max(float(scale.max() if isinstance(scale, Tensor) else scale) for scale in scales)
