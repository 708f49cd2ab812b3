"""Cost: what guidance will take, counted in blocks before anything runs, from the same recipe and route."""

from __future__ import annotations

from skipguide.config import as_whole
from skipguide.pipelines.sampling.ledger import GuidanceCost
from skipguide.pipelines.sampling.recipe import Recipe
from skipguide.pipelines.sampling.route import route
from skipguide.plan import SkipPlan

FINE = 240  # steps that stand for any number of them: windows in tenths, twelfths, … come out exactly


def foretell(recipe: Recipe, *, guidance: bool, steps: int | None) -> GuidanceCost:
    """Average over the steps what `Passes` will run.

    Args:
        recipe: the settings on a model.
        guidance: whether CFG is on.
        steps: number of steps; None averages over a fine grid, so that a window counts as its share.

    Raises:
        SkipError: for timetables over sigma: the noise levels are the scheduler's, known only when it runs; and for
            a number of steps that is none.
    """
    count = FINE if steps is None else as_whole("steps", steps)
    blocks, settings = len(recipe.blocks), recipe.settings
    branches = 2 if guidance else 1
    ran = naive = 0.0
    known: dict[tuple[SkipPlan, ...], int] = {}
    last: tuple[str, ...] | None = None
    for step in range(count):
        moment = recipe.at(step, count)
        ran += branches * blocks if moment.cfg else blocks
        naive += branches * blocks
        plans, keys = tuple(dict.fromkeys(term.plan for term in moment.terms)), tuple(t.key for t in moment.terms)
        before, last = last, keys
        if not plans:
            continue
        if settings.formula == "uncond":
            ran -= len(plans[0].layers) if moment.cfg and plans[0].part == "block" else 0
            continue
        # a number of steps says which of them are fresh; on the fine grid every k-th is a k-th of each
        share = 1 / settings.every if steps is None else float(moment.fresh or keys != before)
        if plans not in known:
            known[plans] = sum(leg.blocks for leg in route(plans, blocks, settings.prefix_reuse))
        ran += share * known[plans]
        naive += share * len(plans) * blocks
    per_step = ran / count
    return GuidanceCost(per_step / blocks, per_step, branches * blocks, naive / count)
