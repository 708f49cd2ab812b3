"""Cost: what guidance will take, in blocks, from the same step plans and shared prefixes that the passes run by."""

from __future__ import annotations

from skipguide.config import as_whole
from skipguide.pipelines.sampling.ledger import GuidanceCost
from skipguide.pipelines.sampling.schedule import GuidanceSchedule, StepPlan
from skipguide.pipelines.sampling.shared_prefixes import SharedPass, share_prefixes
from skipguide.plan import SkipPlan

FINE = 240  # steps that stand for any number of them: windows in tenths, twelfths, … come out exactly


def foretell(schedule: GuidanceSchedule, *, guidance: bool, steps: int | None) -> GuidanceCost:
    """Average over the steps what `DenoiserPasses` will run.

    Args:
        schedule: the settings on a model.
        guidance: whether CFG is on.
        steps: number of steps; None averages over a fine grid, so that a window counts as its share.

    Raises:
        SkipError: for timetables over sigma: the noise levels are the scheduler's, known only when it runs; and for
            a number of steps that is none.
    """
    if steps is None and schedule.times.passes is not None:
        steps = len(schedule.times.passes.steps)
    count = FINE if steps is None else as_whole("steps", steps)
    blocks, settings = len(schedule.blocks), schedule.settings
    branches = 2 if guidance else 1
    ran = naive = 0.0
    known: dict[tuple[SkipPlan, ...], tuple[SharedPass, ...]] = {}
    last: tuple[str, ...] | None = None
    for step in range(count):
        step_plan = schedule.at(step, count)
        still = frozenset() if schedule.times.passes is None else schedule.times.passes.at(step, count).still
        ran += (blocks - len(still)) * (1 + (branches - 1) * _share_of_uncond(step_plan, schedule, steps))
        naive += branches * blocks
        plans = tuple(dict.fromkeys(each.plan for each in step_plan.skipped))
        keys = tuple(each.key for each in step_plan.skipped)
        if not plans:
            last = last if settings.schedule is not None else None  # which goes on with them after other steps
            continue
        before, last = last, keys
        if step_plan.skips_inside:
            ran -= len(plans[0].layers) if plans[0].perturbation.removes else 0
            continue
        # a number of steps says which of them are fresh; on the fine grid every k-th is a k-th of each
        share = 1 / settings.every if steps is None else float(step_plan.fresh or keys != before)
        if plans not in known:
            known[plans] = share_prefixes(plans, blocks, settings.prefix_reuse)
        ran += share * sum(each.blocks - _still(each, still) for each in known[plans])
        naive += share * len(plans) * blocks
    per_step = ran / count
    return GuidanceCost(per_step / blocks, per_step, branches * blocks, naive / count)


def _share_of_uncond(step_plan: StepPlan, schedule: GuidanceSchedule, steps: int | None) -> float:
    """How much of the unconditional pass runs at a step; on the fine grid every k-th step is a k-th of each."""
    if not step_plan.cfg:
        return 0.0
    return 1 / schedule.settings.cfg_every if steps is None else float(step_plan.cfg_fresh)


def _still(skipped: SharedPass, still: frozenset[int]) -> int:
    """How many of the blocks that a skipped pass would run stand still."""
    removed = {layer for term in skipped.plan.terms if term.perturbation.removes for layer in term.layers}
    return sum(block >= (skipped.start or 0) and block not in removed for block in still)
