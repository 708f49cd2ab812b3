"""Recipe: what guidance does at each step on one model, with every layer a number and every scale a value."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from skipguide.blocks import BlockMap
from skipguide.errors import SkipError
from skipguide.pipelines.groups import SkipGroup
from skipguide.pipelines.settings import GuidanceSettings
from skipguide.plan import SkipPlan
from skipguide.schedule import Schedule, Timetable


@dataclass(frozen=True)
class Term:
    """One skipped pass and its scale.

    Attributes:
        key: what has to stay the same for an earlier difference to be used again.
        plan: what is skipped, in execution order.
        scale: s.
    """

    key: str
    plan: SkipPlan
    scale: float


@dataclass(frozen=True)
class Moment:
    """What holds at one step.

    Attributes:
        terms: the skipped passes; none without skip guidance.
        fresh: whether they are run anew (`every`).
        cfg: whether the unconditional prediction is used.
    """

    terms: tuple[Term, ...]
    fresh: bool
    cfg: bool


class Recipe:
    """The settings of a guidance on one model.

    Args:
        settings: the guidance.
        groups: its groups, with layers that are numbers, timetables or `"stochastic"`.
        blocks: the model's blocks.

    Raises:
        SkipError: for a layer, part or stack that the model does not have.
    """

    def __init__(self, settings: GuidanceSettings, groups: Sequence[SkipGroup], blocks: BlockMap) -> None:
        self.settings = settings
        self.groups = tuple(group for group in groups if not group.idle)
        self.blocks = blocks
        self.schedule = Schedule(settings.start, settings.stop, settings.every)
        self.window = Schedule(*settings.cfg_interval) if settings.cfg_interval is not None else None
        self.needs_sigma = any(
            isinstance(table, Timetable) and table.over == "sigma"
            for group in self.groups
            for table in (group.layers, group.scale)
        )
        self._all = {
            block.index
            for group in groups
            for layers in self._possible(group)
            for block in blocks.select(layers, group.part, group.stack)
        }

    @property
    def constant(self) -> bool:
        """Whether the same blocks are skipped at every step, with a pass each time."""
        settings = self.settings
        tables = [each for group in self.groups for each in (group.layers, group.scale)]
        return (settings.start, settings.stop, settings.every) == (0.0, 1.0, 1) and not any(
            isinstance(each, Timetable) or each == "stochastic" for each in tables
        )

    def removes(self, index: int) -> bool:
        """Whether some step may leave out the whole block `index`."""
        return any(
            block.index == index
            for group in self.groups
            if group.part == "block"
            for layers in self._possible(group)
            for block in self.blocks.select(layers, group.part, group.stack)
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """All blocks that some step may skip, in execution order."""
        return tuple(sorted(self._all))

    def refuse_idle(self, steps: int) -> None:
        """Refuse a number of steps of which none has skip guidance: that would silently be the plain pipeline.

        Timetables over sigma are not looked at: the noise levels of later steps are not known yet.

        Raises:
            SkipError: if the windows and timetables leave no step.
        """
        if not self.groups or self.needs_sigma:
            return
        settings, moments = self.settings, (self.at(step, steps) for step in range(steps))
        if not any(moment.terms and (moment.cfg or settings.formula != "uncond") for moment in moments):
            raise SkipError(
                f"none of the {steps} steps of this run has skip guidance, with start={settings.start:g}, "
                f"stop={settings.stop:g}, cfg_interval={settings.cfg_interval} and scale={settings.scale}: widen them, "
                f"take more steps, or scale=0 for the plain pipeline"
            )

    def at(self, step: int, steps: int, sigma: float | None = None) -> Moment:
        """What holds at step `step` (from 0) of `steps`."""
        fraction = step / max(steps, 1)
        cfg = self.window is None or self.window.contains(fraction)
        if not self.schedule.active(step, steps) or (self.settings.formula == "segmented" and cfg):
            return Moment((), False, cfg)
        terms = [self._term(n, group, step, fraction, sigma) for n, group in enumerate(self.groups)]
        fresh = self.schedule.fresh(step, steps)
        return Moment(tuple(term for term in terms if term.scale), fresh, cfg)

    def _term(self, number: int, group: SkipGroup, step: int, fraction: float, sigma: float | None) -> Term:
        layers: Any = group.layers.at(fraction, sigma) if isinstance(group.layers, Timetable) else group.layers
        key = "stochastic" if layers == "stochastic" else f"{layers}"
        if layers == "stochastic":
            layers = self._draw(number, group, step)
        found = sorted(block.index for block in self.blocks.select(layers, group.part, group.stack))
        return Term(f"{number} {key}", SkipPlan(found, part=group.part), group.scale_at(fraction, sigma))

    def _draw(self, number: int, group: SkipGroup, step: int) -> list[int]:
        """A new set of blocks, the same for the same seed, group and step wherever it is drawn."""
        pool, count = self._pool(group)
        return sorted(random.Random(f"{self.settings.seed} {number} {step}").sample(pool, count))

    def _pool(self, group: SkipGroup) -> tuple[list[int], int]:
        """The numbers to draw from (within the group's stack), and how many of them."""
        total = len(self.blocks)
        own = [block for block in self.blocks if group.stack in (None, block.stack)]
        first = total // 2 if self.settings.prefer_cheap else 1
        pool = [
            number
            for number, block in enumerate(own)
            if first <= block.index < total - 1 and block.index > 0 and group.part in block.parts
        ]
        count = max(1, round(self.settings.drop * len(own)))
        if count > len(pool):
            raise SkipError(
                f"layers='stochastic' is to drop {count} blocks (drop={self.settings.drop:g} of {len(own)}), but "
                f"{len(pool)} are to choose from (first and last block stay"
                f"{', and the earlier half with prefer_cheap' if self.settings.prefer_cheap else ''})"
            )
        return pool, count

    def _possible(self, group: SkipGroup) -> list[Sequence[int]]:
        """The layers of every moment."""
        if isinstance(group.layers, Timetable):
            return list(group.layers.values)
        if group.layers == "stochastic":
            self.blocks.select((), group.part, group.stack)
            return [self._pool(group)[0]]
        layers: Any = group.layers
        return [layers]
