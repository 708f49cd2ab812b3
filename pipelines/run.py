"""Run: where one `pipe(...)` call is, and which branch of its guidance the denoiser is being called for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import Tensor

from skipguide.errors import SkipError
from skipguide.pipelines.registry import PipelineSpec

Branch = Literal["both", "cond", "uncond", "only"]


@dataclass
class Run:
    """State of one `pipe(...)` call, shared by the denoisers of a pipeline.

    Attributes:
        timesteps: the scheduler's table; every `pipe(...)` call makes a new one, which is how a new call is noticed.
        step: number of the current step, from 0.
        steps: how many there are.
        w: the CFG scale when the call began.
        branches: denoiser calls in this step so far.
        lone_cond: the step before had a conditional call and no unconditional one.
        cond: the conditional prediction of this step, for the unconditional call after it.
        delta: what guidance added last.
        checked: whether the first skipped pass was seen to have an effect.
    """

    timesteps: Any = None
    step: int = -1
    steps: int = 1
    w: float = 0.0
    branches: int = 0
    lone_cond: bool = False
    cond: Tensor | None = None
    delta: Tensor | None = None
    checked: bool = False

    def enter(self, pipe: Any, spec: PipelineSpec, context: str) -> Branch:
        """Note a call of the denoiser and say for which branch it is.

        Args:
            pipe: the pipeline that calls.
            spec: how it calls.
            context: name of the `cache_context` in force, or empty.
        """
        tells_scale = spec.cfg in ("batched", "two_calls")
        if pipe.scheduler.timesteps is not self.timesteps:
            fresh = Run(pipe.scheduler.timesteps, w=float(pipe._guidance_scale) if tells_scale else 0.0)
            for field in fields(self):
                setattr(self, field.name, getattr(fresh, field.name))
            self.steps = getattr(pipe, "_num_timesteps", None) or len(self.timesteps)
        if not tells_scale:
            branch: Branch = "uncond" if context.endswith("uncond") else "cond"
        elif not (self.w if spec.dynamic else float(pipe._guidance_scale)) > 1:
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
        if self.step >= self.steps:
            raise SkipError(
                f"{type(pipe).__name__} has {self.steps} steps, but its denoiser was called for a further one: does "
                f"another pipeline use the same denoiser? Give it a copy, or apply guidance while only one of them runs"
            )
        return branch
