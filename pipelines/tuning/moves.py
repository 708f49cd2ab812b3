"""Moves: what can be changed at one step of a schedule so that fewer blocks run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from skipguide.errors import SkipError
from skipguide.pipelines.pass_schedule import How, PassSchedule, PassStep

Instead = Literal["reused", "left_out"]
_DOWN: dict[How, tuple[How, ...]] = {"on": ("reused", "off"), "reused": ("off",), "off": ()}


@dataclass(frozen=True)
class StillBlock:
    """A block that may stand still.

    Attributes:
        block: its number.
        how: what is done in its place.
        damage: what that did by itself.
    """

    block: int
    how: Instead
    damage: float


@dataclass(frozen=True)
class Move:
    """One change.

    Attributes:
        step: where.
        name: of what: `"cfg"`, `"skip"`, or `"blocks"`.
        to: what becomes of it; of blocks, the next ones in the order stand still.
    """

    step: int
    name: Literal["cfg", "skip", "blocks"]
    to: How = "off"

    def made(self, schedule: PassSchedule, order: Sequence[StillBlock], at_once: int) -> PassSchedule | None:
        """The schedule with this change; None where it has none, or what it leaves out is used again later.

        Args:
            schedule: the schedule.
            order: of the blocks, the first to stand still first.
            at_once: how many of them a move takes.
        """
        now = schedule.steps[self.step]
        if self.name == "blocks":
            more = [each for each in order if each.block not in now.still][:at_once]
            new = _still(now, more)
        else:
            change: dict[str, Any] = {self.name: self.to}
            new = replace(now, **change) if self.to in _DOWN[getattr(now, self.name)] else now
        return None if new == now else _with(schedule, self.step, new)


def _still(step: PassStep, blocks: Sequence[StillBlock]) -> PassStep:
    ways: dict[str, list[int]] = {"reused": list(step.reused), "left_out": list(step.left_out)}
    for each in blocks:
        ways[each.how].append(each.block)
    return replace(step, reused=tuple(ways["reused"]), left_out=tuple(ways["left_out"]))


def all_moves(steps: int) -> list[Move]:
    """Every kind of change at every step."""
    found = []
    for step in range(steps):
        found += [Move(step, "cfg", "reused"), Move(step, "cfg"), Move(step, "skip", "reused"), Move(step, "skip")]
        found.append(Move(step, "blocks"))
    return found


def alone(schedule: PassSchedule, block: int, how: Instead) -> PassSchedule | None:
    """The schedule with one block standing still at every second step that allows it; None where none does."""
    made, each = schedule, [StillBlock(block, how, 0.0)]
    for number in range(1, len(schedule.steps), 2):
        made = _with(made, number, _still(made.steps[number], each)) or made  # a pass may run there for the first time
    return None if made == schedule else made


def _with(schedule: PassSchedule, number: int, step: PassStep) -> PassSchedule | None:
    """The schedule with another step; None where a step has nothing to use again then."""
    try:
        return PassSchedule([*schedule.steps[:number], step, *schedule.steps[number + 1 :]])
    except SkipError:
        return None
