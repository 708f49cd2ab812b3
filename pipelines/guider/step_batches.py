"""What a guider asks a pipeline for: the groups that can act, and the passes of one step, as data."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from skipguide.errors import SkipError
from skipguide.pipelines.groups import SkipGroup
from skipguide.pipelines.sampling.schedule import StepOutline, StepTimes
from skipguide.pipelines.settings import GuidanceSettings


@dataclass(frozen=True)
class StepBatch:
    """One call of the denoiser that the guider asks the pipeline for.

    Attributes:
        name: as the guider calls its prediction, which is also the name of the pipeline's cache context.
        inputs: 0 takes the conditional inputs, 1 the unconditional ones.
        kind: `"plain"`; `"capture"`, with every block, keeping what the skipped passes start from; `"weak"`, the
            layers left out in a pass of the pipeline's own; `"skip"`, the further pass of a group.
        group: number of that group among those of the step.
    """

    name: str
    inputs: int = 0
    kind: str = "plain"
    group: int = 0


def step_batches(outline: StepOutline, *, held: bool, difference: bool = False) -> tuple[StepBatch, ...]:
    """The calls of a step, in an order that lets go of the activations as early as possible.

    Args:
        outline: what holds at the step.
        held: whether the directions of an earlier step may be used again.
        difference: whether its c - u may be.

    Example:
        >>> [[each.name for each in step_batches(StepOutline(groups, True), held=False)] for groups in ((), (0,))]
        [['pred_cond', 'pred_uncond'], ['pred_cond', 'pred_cond_skip', 'pred_uncond']]
    """
    runs = outline.cfg and (outline.cfg_fresh or not difference)
    cond, uncond = StepBatch("pred_cond"), [StepBatch("pred_uncond", 1)] if runs else []
    if outline.skips_inside:
        return cond, StepBatch("pred_uncond", 1, "weak")
    if not outline.groups or (held and not outline.fresh):
        return (cond, *uncond)
    names = [f"pred_cond_skip_{n}" if n else "pred_cond_skip" for n in range(len(outline.groups))]
    if outline.place == "uncond":
        skipped = [StepBatch(name, 1, "skip", number) for number, name in enumerate(names)]
        return (cond, StepBatch("pred_uncond", 1, "capture"), *skipped)
    skipped = [StepBatch(name, 0, "skip", number) for number, name in enumerate(names)]
    return (StepBatch("pred_cond", 0, "capture"), *skipped, *uncond)


def live_groups(settings: GuidanceSettings) -> tuple[SkipGroup, ...]:
    """The groups that can ever be active.

    Raises:
        SkipError: for layers and scales that a guider cannot know.
    """
    if isinstance(settings.layers, Mapping):
        raise SkipError("a guider belongs to one denoiser: pass its layers; guider_2 is another SkipGuider")
    groups = settings.groups or (settings.group,)
    live = tuple(group for group in groups if not group.idle)
    for group in live:
        if group.layers == "auto":
            raise SkipError(
                "layers='auto' calibrates on a pipeline, which a guider does not see: `skipguide rank` first"
            )
        if group.layers is None and group.stack is not None:
            raise SkipError("presets count layers over all stacks: with stack, name the layers too")
    if any(table.over == "sigma" for table in StepTimes(settings, live).tables):
        raise SkipError("a guider is not told the noise level: use Timetable(..., over='step')")
    return live


def abandon(guider: weakref.ref[Any], passes: tuple[StepBatch, ...]) -> None:
    """End a guider's step whose batches were freed while it was still running: the loop failed."""
    if (alive := guider()) is not None and alive._passes is passes:
        alive._end()
