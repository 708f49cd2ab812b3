"""Schedule: what guidance does at each step. Without a model, which groups skip; on a model, which blocks that is."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skipguide.blocks import Block, BlockMap
from skipguide.errors import SkipError
from skipguide.parts import PART_SPECS
from skipguide.perturbations.at_parts import AT_PARTS
from skipguide.pipelines.formulas import Place
from skipguide.pipelines.groups import SkipGroup, value_at, values_of
from skipguide.pipelines.settings import GuidanceSettings
from skipguide.plan import SkipPlan
from skipguide.schedule import Schedule, Timetable


@dataclass(frozen=True)
class SkippedPass:
    """One skipped pass and its scale.

    Attributes:
        key: what has to stay the same for an earlier direction to be used again.
        plan: what is skipped, in execution order.
        scale: s, or that of every modality.
    """

    key: str
    plan: SkipPlan
    scale: float | dict[str, float]


@dataclass(frozen=True)
class StepOutline:
    """What holds at one step, whatever the model is.

    Attributes:
        groups: numbers of the groups that are skipped, a pass each; none without skip guidance.
        fresh: whether their passes are run at this step (`every`), or the last directions are used again.
        cfg: whether the unconditional prediction is used.
        cfg_fresh: whether its pass is run at this step (`cfg_every`), or u is c less the last difference c - u.
        place: where the skipped passes run, as `Formula.place` says; `"cond"` on a step without CFG.
        rescale: how far the deviation of the result is brought towards that of c; 0 without skip guidance.
        w: the CFG scale, where the settings say one; None is the pipeline's.
    """

    groups: tuple[int, ...] = ()
    fresh: bool = False
    cfg: bool = True
    cfg_fresh: bool = True
    place: Place = "cond"
    rescale: float = 0.0
    w: float | None = None

    @property
    def skips_inside(self) -> bool:
        """Whether the layers are left out in the pipeline's own unconditional pass, so that no pass is added."""
        return bool(self.groups) and self.place == "inside_uncond"


@dataclass(frozen=True)
class StepPlan(StepOutline):
    """What holds at one step on one model.

    Attributes:
        skipped: the skipped passes, one for each of `groups`.
    """

    skipped: tuple[SkippedPass, ...] = ()


class StepTimes:
    """Which groups are skipped at which step.

    Args:
        settings: the guidance.
        groups: its groups with a scale that is not always 0.
    """

    def __init__(self, settings: GuidanceSettings, groups: Sequence[SkipGroup]) -> None:
        self.groups = tuple(groups)
        self.skips = settings.window
        self.cfg = settings.cfg_steps
        self.passes = settings.schedule
        self.rule = settings.rule
        self.rescale, self.w = settings.rescale or 0.0, settings.guidance_scale

    @property
    def tables(self) -> tuple[Timetable, ...]:
        """What changes with the step."""
        own = tuple(each for each in (self.rescale, self.w) if isinstance(each, Timetable))
        return (*own, *(table for group in self.groups for table in group.tables))

    @property
    def own_cfg(self) -> bool:
        """Whether the settings say where the unconditional pass runs."""
        return self.cfg is not None or self.passes is not None

    @property
    def leaves_uncond_out(self) -> str:
        """The setting for which some steps of a run with CFG have no unconditional pass; empty without one."""
        if self.passes is not None:
            return "schedule"
        if self.cfg is not None:
            return "cfg_interval" if self.cfg.every == 1 else "cfg_every"
        return "guidance_scale, which is 1 at some step," if 1 in values_of(self.w) else ""

    def at(self, step: int, steps: int, sigma: float | None = None, *, cfg: bool = True) -> StepOutline:
        """What holds at step `step` (from 0) of `steps`; `cfg` is whether the run has CFG at all."""
        fraction = step / max(steps, 1)
        said = None if self.passes is None else self.passes.at(step, steps)
        cfg = cfg and (said.cfg != "off" if said is not None else self.cfg is None or self.cfg.contains(fraction))
        w = value_at(self.w, fraction, sigma) if cfg else None
        cfg, w = (cfg, w) if w != 1 else (False, None)  # nothing of u is in it
        renewed = said.cfg == "on" if said is not None else self.cfg is None or not cfg or self.cfg.fresh(step, steps)
        rule = self.rule
        shut_out = rule.window is not None if cfg else rule.in_place_of_uncond
        if shut_out or (said is not None and said.skip == "off") or not self.skips.active(step, steps):
            return StepOutline(cfg=cfg, cfg_fresh=renewed, w=w)
        live = tuple(number for number, group in enumerate(self.groups) if group.acts_at(fraction, sigma))
        amount = value_at(self.rescale, fraction, sigma) if live else 0.0
        place: Place = rule.place if cfg else "cond"
        fresh = said.skip == "on" if said is not None else self.skips.fresh(step, steps)
        return StepOutline(live, fresh, cfg, renewed, place, amount, w)


class GuidanceSchedule:
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
        self.times = StepTimes(settings, self.groups)
        self.needs_sigma = any(table.over == "sigma" for table in self.times.tables)
        self._all = {
            block.index for group in groups for layers in self._possible(group) for block in self._proven(group, layers)
        }

    @property
    def constant(self) -> bool:
        """Whether the same blocks are skipped at every step, with a pass each time."""
        stochastic = any(group.layers == "stochastic" for group in self.groups)
        settings = self.settings
        return settings.window == Schedule() and settings.schedule is None and not self.times.tables and not stochastic

    def removes(self, index: int) -> bool:
        """Whether some step may leave out the whole block `index`."""
        return any(
            block.index == index
            for group in self.groups
            if group.perturbation.removes
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
        if not self.groups or self.needs_sigma or self.times.passes is not None:
            return
        settings, window = self.settings, self.settings.window
        if not any(self.times.at(step, steps).groups for step in range(steps)):
            raise SkipError(
                f"none of the {steps} steps of this run has skip guidance, with start={window.start:g}, "
                f"stop={window.stop:g}, cfg_interval={settings.cfg_interval} and scale={settings.scale}: widen them, "
                f"take more steps, or scale=0 for the plain pipeline"
            )

    def at(self, step: int, steps: int, sigma: float | None = None, *, cfg: bool = True) -> StepPlan:
        """What holds at step `step` (from 0) of `steps`; `cfg` is whether the run has CFG at all."""
        outline = self.times.at(step, steps, sigma, cfg=cfg)
        skipped = tuple(self._skipped(number, step, step / max(steps, 1), sigma) for number in outline.groups)
        return StepPlan(**vars(outline), skipped=skipped)

    def _skipped(self, number: int, step: int, fraction: float, sigma: float | None) -> SkippedPass:
        group = self.groups[number]
        layers: Any = value_at(group.layers, fraction, sigma)
        key = "stochastic" if layers == "stochastic" else f"{layers}"
        if layers == "stochastic":
            layers = self._draw(number, group, step)
        chosen = self.blocks.select(layers, group.part, group.stack)
        blocks = {block.index: layer for layer, block in zip(layers, chosen, strict=True)}
        told = group.perturbation.fields
        if isinstance(group.heads, Mapping):  # by the blocks' numbers over all stacks, as the layers
            told["heads"] = {index: group.heads[layer] for index, layer in blocks.items()}
        if "seed" in PART_SPECS[group.part].options:
            own = f"{self.settings.seed} {group.perturbation.option('seed')} {number} {step}"
            told["part_options"] = {**told["part_options"], "seed": random.Random(own).getrandbits(32)}
        return SkippedPass(f"{number} {key}", SkipPlan(sorted(blocks), **told), group.scale_at(fraction, sigma))

    def _proven(self, group: SkipGroup, layers: Sequence[int]) -> list[Block]:
        """The blocks that some layers of a group are.

        Raises:
            SkipError: for a layer or heads that the model does not have, or that `heads` names no heads of.
        """
        found = self.blocks.select(layers, group.part, group.stack)
        for layer, block in zip(layers, found, strict=True):
            AT_PARTS[group.part](block, group.perturbation.at(layer))
        return found

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
        """The layers of every step, in all their forms."""
        if isinstance(group.layers, Timetable):
            return [layers for layers in group.layers.values if layers]
        if group.layers == "stochastic":
            self.blocks.select((), group.part, group.stack)
            return [self._pool(group)[0]]
        layers: Any = group.layers
        return [layers]
