"""What a guider asks a pipeline for: the groups that can act, and the passes of one step, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from skipguide.errors import SkipError
from skipguide.pipelines.groups import SkipGroup
from skipguide.pipelines.settings import GuidanceSettings
from skipguide.schedule import Schedule, Timetable


@dataclass(frozen=True)
class Pass:
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


def passes_of(
    settings: GuidanceSettings,
    groups: Sequence[SkipGroup],
    step: int,
    steps: int,
    *,
    cfg: bool,
    held: bool,
) -> tuple[Pass, ...]:
    """The passes of a step, in an order that lets go of the activations as early as possible.

    Args:
        settings: the guidance.
        groups: its groups with a scale that is not always 0; empty where guidance is switched off.
        step: from 0.
        steps: how many there are.
        cfg: whether there is CFG at all.
        held: whether the differences of an earlier step may be used again.

    Example:
        >>> from skipguide.pipelines import SpatiotemporalSkipGuidance
        >>> stg = SpatiotemporalSkipGuidance([8], start=0.5)
        >>> groups = [SkipGroup([8])]
        >>> [[each.name for each in passes_of(stg, groups, step, 4, cfg=True, held=False)] for step in (1, 2)]
        [['pred_cond', 'pred_uncond'], ['pred_cond', 'pred_cond_skip', 'pred_uncond']]
    """
    window = settings.cfg_interval
    cfg = cfg and (window is None or Schedule(*window).contains(step / steps))
    schedule = Schedule(settings.start, settings.stop, settings.every)
    active = schedule.active(step, steps) and not (settings.formula == "segmented" and cfg)
    live = [group for group in groups if active and group.scale_at(step / steps)]
    cond, uncond = Pass("pred_cond"), [Pass("pred_uncond", 1)] if cfg else []
    if live and settings.formula == "uncond":
        return (cond, Pass("pred_uncond", 1, "weak")) if cfg else (cond,)
    if not live or (held and not schedule.fresh(step, steps)):
        return (cond, *uncond)
    names = [f"pred_cond_skip_{n}" if n else "pred_cond_skip" for n in range(len(live))]
    if settings.formula == "wan" and cfg:
        return (cond, Pass("pred_uncond", 1, "capture"), *(Pass(x, 1, "skip", n) for n, x in enumerate(names)))
    return (Pass("pred_cond", 0, "capture"), *(Pass(x, 0, "skip", n) for n, x in enumerate(names)), *uncond)


def live_groups(settings: GuidanceSettings) -> tuple[SkipGroup, ...]:
    """The groups that can ever be active.

    Raises:
        SkipError: for layers and scales that a guider cannot know.
    """
    if isinstance(settings.layers, Mapping):
        raise SkipError("a guider belongs to one denoiser: pass its layers; guider_2 is another SkipGuider")
    groups = settings.groups or (SkipGroup(settings.layers, settings.scale, settings.part, settings.stack),)
    live = tuple(group for group in groups if not group.idle)
    for group in live:
        if group.layers == "auto":
            raise SkipError(
                "layers='auto' calibrates on a pipeline, which a guider does not see: `skipguide rank` first"
            )
        if group.layers is None and group.stack is not None:
            raise SkipError("presets count layers over all stacks: with stack, name the layers too")
        if any(isinstance(table, Timetable) and table.over == "sigma" for table in (group.layers, group.scale)):
            raise SkipError("a guider is not told the noise level: use Timetable(..., over='step')")
    return live
