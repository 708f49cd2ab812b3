"""Tune: search the schedule that runs a given share of the blocks and stays closest to the user's own full runs.

Greedy, with the error fed back: a change is judged by where whole runs end when it is added to all changes before it,
by the damage per block that it saves. A change that was judged long ago is judged anew before it is made.
"""

from __future__ import annotations

import heapq
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, get_args

from skipguide.blocks import find_blocks
from skipguide.config import as_number, as_whole
from skipguide.errors import SkipError
from skipguide.hosts.progress import progress_bar
from skipguide.pipelines.conflicts import denoisers_of
from skipguide.pipelines.pass_schedule import How, PassSchedule, PassStep
from skipguide.pipelines.registry.described import pipeline_spec
from skipguide.pipelines.sampling.schedule import StepOutline, StepTimes
from skipguide.pipelines.stg import SpatiotemporalSkipGuidance
from skipguide.pipelines.tuning.moves import Instead, Move, StillBlock, all_moves, alone
from skipguide.pipelines.tuning.trajectories import Trajectories
from skipguide.shown import Row, Shown

LEAST = 0.05
LEVELS = 4  # a move lets a quarter of the blocks stand still
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TunedStep:
    """One schedule on the way.

    Attributes:
        schedule: what runs.
        share: of the blocks of the full runs.
        damage: squared distance of the final latents from the full runs', relative to these; 0 is none.
    """

    schedule: PassSchedule
    share: float
    damage: float


@dataclass(frozen=True, repr=False)
class TunedSchedule(Shown):
    """What `tune` found.

    Attributes:
        path: from the full runs to the budget, each with one change more.
        order: the blocks, the first to stand still first.
        runs: how many times the pipeline was called.
    """

    path: tuple[TunedStep, ...]
    order: tuple[StillBlock, ...]
    runs: int

    @property
    def schedule(self) -> PassSchedule:
        """The schedule for the budget."""
        return self.path[-1].schedule

    @property
    def share(self) -> float:
        """The share of the blocks of the full runs that it runs."""
        return self.path[-1].share

    @property
    def error(self) -> float:
        """How far the final latents are from those of the full runs, relative to their norm."""
        return math.sqrt(self.path[-1].damage)

    def within(self, budget: float) -> TunedStep:
        """The first schedule on the way that runs at most this share.

        Raises:
            SkipError: if none does.
        """
        found = next((each for each in self.path if each.share <= budget), None)
        if found is None:
            raise SkipError(f"no schedule on the way runs at most {budget:g} of the blocks; the last has {self.share}")
        return found

    def _heading(self) -> str:
        return f"{self.share:.1%} of the blocks run, latents {self.error:.1%} off the full runs ({self.runs} runs)"

    def _rows(self) -> list[Row]:
        return [("share", "latents off"), *((each.share, math.sqrt(each.damage)) for each in self.path)]


def tune(
    pipe: Any,
    calls: Sequence[Mapping[str, Any]],
    budget: float = 0.6,
    *,
    guidance: SpatiotemporalSkipGuidance | None = None,
    blocks: bool = True,
    levels: int = LEVELS,
) -> TunedSchedule:
    """Search a `PassSchedule` on a few runs. Nothing is trained, and nothing of the pipeline is changed.

    Args:
        pipe: a stock diffusers pipeline that is described, without a cache.
        calls: arguments of the pipeline's call, a mapping for each run, with `seed` in place of a generator. Sizes and
            steps that are not said are those of the `generation.json` in the pipeline's folder, or its own.
        budget: share of the blocks that the guidance runs now, above 0.05 and at most 1.
        guidance: what the full runs are guided by; None is the model's preset. `scale=0` is the pipeline alone. Its
            windows and strides (`start`, `cfg_interval`, `every`, …) are where the search begins.
        blocks: whether blocks may stand still too; else passes are left out or made of earlier ones.
        levels: in how many moves all blocks of a step come to stand still.

    Raises:
        SkipError: as `guidance.apply(pipe)` does, and for calls that cannot be repeated.

    Example:
        >>> from skipguide.pipelines import bundled_pipeline, tune
        >>> pipe, call = bundled_pipeline()
        >>> calls = [call | {"prompt": "a red circle moving right", "num_inference_steps": 2}]
        >>> tuned = tune(pipe, calls, budget=0.8, blocks=False)
        >>> len(tuned.schedule.steps), tuned.share <= 0.8
        (2, True)
    """
    budget, levels = as_number("budget", budget), as_whole("levels", levels)
    if not LEAST < budget <= 1:
        raise SkipError(f"budget is a share of the blocks, above {LEAST} and at most 1; got {budget}")
    given = SpatiotemporalSkipGuidance() if guidance is None else guidance
    settings = given.for_pipeline(pipe)
    settings.scheduled(PassSchedule([PassStep()]))  # refused now, not after the first runs
    runs = Trajectories(pipe, calls, settings)
    schedule = beginning(settings, runs.steps, runs.cfg)
    names = denoisers_of(pipe, pipeline_spec(pipe))
    total = min(len(find_blocks(getattr(pipe, name))) for name in names)
    order = _order(runs, schedule, total) if blocks else ()
    full = runs.blocks(schedule)
    path = [TunedStep(schedule, 1.0, 0.0)]
    with progress_bar(what="blocks saved", total=round(full * (1 - budget))) as bar:
        found = _search(runs, schedule, order, math.ceil(total / levels))
        while path[-1].share > budget and (step := next(found, None)) is not None:
            path.append(TunedStep(step[0], step[1] / full, step[2]))
            bar.update(min(round((1 - path[-1].share) * full), bar.total) - bar.n)
    if path[-1].share > budget:
        logger.warning("no schedule within %g was found: the last one runs %.3f", budget, path[-1].share)
    return TunedSchedule(tuple(path), tuple(order), runs.runs)


def beginning(settings: SpatiotemporalSkipGuidance, steps: int, cfg: bool) -> PassSchedule:
    """What some settings run at each step, as a schedule.

    Args:
        settings: the guidance on a pipeline.
        steps: of a run.
        cfg: whether the run has CFG.
    """
    groups = () if settings.idle else settings.groups or (settings.group,)
    times = StepTimes(settings, [group for group in groups if not group.idle])
    return PassSchedule([_step(times.at(step, steps, cfg=cfg)) for step in range(steps)])


def _step(outline: StepOutline) -> PassStep:
    skip: How = ("on" if outline.fresh else "reused") if outline.groups else "off"
    return PassStep(cfg=("on" if outline.cfg_fresh else "reused") if outline.cfg else "off", skip=skip)


def _order(runs: Trajectories, schedule: PassSchedule, total: int) -> list[StillBlock]:
    """The blocks by what they do when they alone stand still at every second step, the least first."""
    found = []
    for block in progress_bar(range(total), "each block alone"):
        changed = {how: alone(schedule, block, how) for how in get_args(Instead)}
        ways = [StillBlock(block, how, runs.damage(one)) for how, one in changed.items() if one is not None]
        found.append(min(ways, key=lambda each: each.damage))
    return sorted(found, key=lambda each: each.damage)


def _search(
    runs: Trajectories, schedule: PassSchedule, order: Sequence[StillBlock], at_once: int
) -> Iterator[tuple[PassSchedule, float, float]]:
    """Schedules with one change more each, the blocks that they run, and their damage."""
    ties, made, damage, blocks = count(), 0, 0.0, runs.blocks(schedule)
    waiting: list[Move] = []
    # damage per block saved, after how many changes that was found (-1: never), the move
    heap = [(-math.inf, next(ties), -1, move) for move in all_moves(len(schedule.steps))]
    while heap:
        ratio, _, when, move = heapq.heappop(heap)
        changed = move.made(schedule, order, at_once)
        saved = 0.0 if changed is None else blocks - runs.blocks(changed)
        if changed is None or saved <= 0:
            waiting.append(move)  # another change may make room for it
            continue
        if when < made:
            ratio = (runs.damage(changed) - damage) / saved
            if math.isinf(ratio):
                waiting.append(move)
                continue
            if heap and ratio > heap[0][0]:
                heapq.heappush(heap, (ratio, next(ties), made, move))
                continue
        schedule, damage, blocks, made = changed, damage + ratio * saved, blocks - saved, made + 1
        yield schedule, blocks, damage
        if move.name == "blocks":
            heapq.heappush(heap, (ratio, next(ties), -1, move))
        heap += [(-math.inf, next(ties), -1, each) for each in waiting]
        heapq.heapify(heap)
        waiting = []
