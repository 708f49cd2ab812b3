"""Tangential amplifying guidance (TAG, arXiv 2510.04533): each sampling step turned further round the origin."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from skipguide.config import JsonConfig, normalize_fields
from skipguide.errors import LostGateError, SkipError
from skipguide.guidance import tangential_update
from skipguide.pipelines.registry.described import refuse_no_pipeline
from skipguide.schedule import Schedule
from skipguide.shown import Shown


@dataclass(repr=False)
class TangentialStats(Shown):
    """What tangential amplifying guidance did.

    Attributes:
        steps: sampling steps that were changed.
    """

    steps: int = 0

    def _heading(self) -> str:
        return f"TangentialStats: {self}"

    def __str__(self) -> str:
        return f"{self.steps} steps changed" if self.steps else "no step changed yet"


@dataclass(frozen=True, repr=False)
class TangentialAmplifyingGuidance(JsonConfig):
    """Amplify the part of each sampling step that is tangential to the sample: no further pass, no training.

    A step takes x to x + d. With P the projection onto x, per batch row, it becomes x + P d + scale (d - P d)
    (equation 6 of arXiv 2510.04533): the radial part, which follows the noise schedule, stays. It acts on the
    scheduler's step, so it is exact for every solver, and goes together with any other guidance on the pipeline.

    Args:
        scale: the paper's eta, 1 or more; 1 leaves the pipeline as it is, to the bit.
        start: first step, as a fraction of the steps (inclusive).
        stop: end of the window, as a fraction of the steps (exclusive; 1.0 is the end).

    Raises:
        SkipError: for a scale below 1 or an empty window.

    Example:
        >>> tag = TangentialAmplifyingGuidance(scale=1.15)
        >>> TangentialAmplifyingGuidance.from_dict(tag.to_dict()) == tag
        True
    """

    scale: float = 1.15
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        normalize_fields(self, numbers={"scale": 1})
        window = Schedule(self.start, self.stop)
        object.__setattr__(self, "start", window.start)
        object.__setattr__(self, "stop", window.stop)

    def apply(self, pipe: Any) -> AppliedTangential:
        """Apply to a pipeline, until `remove()` or the end of the `with` block.

        Args:
            pipe: any pipeline of diffusers whose scheduler has a `step` from a sample to the next one.

        Returns:
            A handle: context manager, `.remove()`, `.stats`.

        Raises:
            SkipError: for something that is no pipeline, one without such a scheduler, or one that has this already.
        """
        refuse_no_pipeline(pipe)
        scheduler = getattr(pipe, "scheduler", None)
        step = getattr(scheduler, "step", None)
        if not callable(step) or "sample" not in inspect.signature(step).parameters:
            raise SkipError(
                f"expected a pipeline whose scheduler has a step(..., sample=...); got {type(pipe).__name__} with "
                f"{type(scheduler).__name__}"
            )
        if isinstance(step, _AmplifiedStep):
            raise SkipError(
                "tangential amplifying guidance is already applied to this pipeline's scheduler: call remove() on the "
                "earlier handle first"
            )
        return AppliedTangential(self, pipe)


class _AmplifiedStep:
    """Stands in for a scheduler's `step`. A deep copy of the scheduler (pipelines make them) has a copy of its own."""

    def __init__(self, scheduler: Any, settings: TangentialAmplifyingGuidance, stats: list[TangentialStats]) -> None:
        self.scheduler = scheduler
        self.settings = settings
        self.stats = stats
        self.before = scheduler.__dict__.get("step")
        self.__signature__ = inspect.signature(scheduler.step)

    def __deepcopy__(self, memo: dict[int, Any]) -> _AmplifiedStep:
        copied = object.__new__(_AmplifiedStep)
        copied.__dict__.update(self.__dict__)
        copied.scheduler = memo.get(id(self.scheduler), self.scheduler)
        return copied

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One step, its tangential part amplified."""
        given = self.__signature__.bind(*args, **kwargs).arguments
        inside = self._inside(given.get("timestep"))  # first: the step itself moves on
        call = self.before or type(self.scheduler).step.__get__(self.scheduler)
        out = call(*args, **kwargs)
        if not inside or self.settings.scale == 1:
            return out
        after: Tensor = out[0]
        changed = tangential_update(given["sample"], after, self.settings.scale)
        self.stats[0].steps += 1
        if isinstance(out, tuple):
            return (changed, *out[1:])
        return type(out)(**{**out, next(iter(out)): changed})

    def _inside(self, timestep: Any) -> bool:
        """Whether this step lies in the window."""
        settings = self.settings
        if (settings.start, settings.stop) == (0.0, 1.0):
            return True
        steps = len(self.scheduler.timesteps)
        found = [i for i, each in enumerate(self.scheduler.timesteps.tolist()) if each == float(timestep)]
        if not found:
            raise SkipError(
                f"{type(self.scheduler).__name__} was stepped at a time that is not one of its timesteps, which a "
                f"window goes by (start={settings.start:g}, stop={settings.stop:g}): use start=0, stop=1"
            )
        return Schedule(settings.start, settings.stop).active(found[0], steps)


class AppliedTangential(Shown):
    """Tangential amplifying guidance in force on a pipeline. Leave the `with` block or call `remove()` to end it.

    Attributes:
        settings: what was applied.
        stats: how many steps it changed.
    """

    def __init__(self, settings: TangentialAmplifyingGuidance, pipe: Any) -> None:
        self.settings = settings
        self.stats = TangentialStats()
        self._scheduler = pipe.scheduler
        self._step: _AmplifiedStep | None = _AmplifiedStep(pipe.scheduler, settings, [self.stats])
        self._scheduler.step = self._step

    def _heading(self) -> str:
        where = f"on {type(self._scheduler).__name__}" if self._step is not None else "removed"
        return f"Tangential amplifying guidance ({where}): {self.stats}"

    def remove(self) -> None:
        """End it; nothing is left on the scheduler. A second call does nothing.

        Raises:
            LostGateError: if something else was put in place of the scheduler's step meanwhile.
        """
        if (step := self._step) is None:
            return
        if self._scheduler.__dict__.get("step") is not step:
            raise LostGateError(
                f"the step of this {type(self._scheduler).__name__} was replaced while tangential amplifying guidance "
                f"was on: take that off first, then remove() again"
            )
        if step.before is None:
            del self._scheduler.step
        else:
            self._scheduler.step = step.before
        self._step = self._scheduler = None

    def __enter__(self) -> AppliedTangential:
        """Return the handle.

        Raises:
            SkipError: if it was removed before: the block would silently run without it.
        """
        if self._step is None:
            raise SkipError("this guidance was removed: call apply(pipe) again for a new handle")
        return self

    def __exit__(self, *exc: object) -> None:
        """End it."""
        self.remove()
