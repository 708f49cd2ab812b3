"""Pass schedule: for every step which passes run, what is used again in place of the others, and which blocks run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from skipguide.config import JsonConfig, is_one_of, layer_tuple
from skipguide.errors import SkipError
from skipguide.shown import Row, Shown

How = Literal["on", "reused", "off"]
Branch = Literal["cond", "uncond", "skip"]
MOST_STEPS = 10_000


@dataclass(frozen=True, repr=False)
class PassStep(JsonConfig):
    """One step of a `PassSchedule`.

    Args:
        cfg: the unconditional pass: `"on"` runs it, `"reused"` takes u to be c less the last difference c - u, `"off"`
            has no CFG, so that the result is made of c alone.
        skip: the skipped passes: `"on"` runs them, `"reused"` adds the last directions again (times the scale of this
            step), `"off"` has no skip guidance.
        reused: blocks that do not run: each adds what it added when it last ran in the same pass of an earlier step.
        left_out: blocks that do not run and add nothing.

    Raises:
        SkipError: for words, or block numbers, that mean nothing.
    """

    cfg: How = "on"
    skip: How = "on"
    reused: Sequence[int] = ()
    left_out: Sequence[int] = ()

    def __post_init__(self) -> None:
        """Bring the blocks to their normal form and check."""
        for name in ("cfg", "skip"):
            if not is_one_of(value := getattr(self, name), get_args(How)):
                raise SkipError(f"expected {name} of a step as one of {', '.join(get_args(How))}; got {value!r}")
        for name in ("reused", "left_out"):
            blocks = layer_tuple(getattr(self, name))
            if any(block < 0 for block in blocks):
                raise SkipError(f"{name} are block numbers from 0 on; got {blocks}")
            object.__setattr__(self, name, tuple(sorted(blocks)))
        if twice := set(self.reused) & set(self.left_out):
            raise SkipError(f"blocks {sorted(twice)} are both reused and left out")

    @property
    def still(self) -> frozenset[int]:
        """The blocks that do not run."""
        return frozenset((*self.reused, *self.left_out))

    def runs(self, branch: Branch) -> bool:
        """Whether this step computes that prediction."""
        return branch == "cond" or (self.cfg if branch == "uncond" else self.skip) == "on"


@dataclass(frozen=True)
class PassSchedule(JsonConfig, Shown):
    """What runs at each of a fixed number of steps; `tune` searches one, `SpatiotemporalSkipGuidance` takes it.

    It takes the place of `start`, `stop`, `every`, `cfg_interval` and `cfg_every`. A run with another number of steps
    is refused: what a step may use again depends on the steps before it.

    Args:
        steps: a `PassStep` for each step (or its `to_dict()`).

    Raises:
        SkipError: for no steps, or one that uses again what no step before it has computed.

    Example:
        >>> schedule = PassSchedule([PassStep(), PassStep(cfg="reused", skip="off"), PassStep(skip="reused")])
        >>> PassSchedule.from_dict(schedule.to_dict()) == schedule, schedule.blocks
        (True, ())
    """

    steps: Sequence[PassStep]

    def __post_init__(self) -> None:
        """Check that whatever is used again was computed before."""
        given: Any = self.steps  # from JSON: plain data
        if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
            raise SkipError(f"steps is a list of PassStep; got {type(given).__name__}")
        steps = tuple(each if isinstance(each, PassStep) else PassStep.from_dict(each) for each in given)
        if not 0 < len(steps) <= MOST_STEPS:
            raise SkipError(f"a PassSchedule has 1 to {MOST_STEPS} steps; got {len(steps)}")
        object.__setattr__(self, "steps", steps)
        for name in ("cfg", "skip"):
            ways = [getattr(step, name) for step in steps]
            if "reused" in ways and "on" not in ways[: ways.index("reused")]:
                raise SkipError(f"step {ways.index('reused')} reuses {name}, and no step before it has {name}='on'")
        for branch in get_args(Branch):
            self._check_blocks(branch)

    def _check_blocks(self, branch: Branch) -> None:
        """Refuse a block that a pass is to use again without having run it."""
        ran: set[int] = set()
        known = set(self.blocks)
        for number, step in enumerate(self.steps):
            if step.runs(branch):
                if missing := set(step.reused) - ran:
                    raise SkipError(
                        f"step {number} reuses the blocks {sorted(missing)}, which ran in no {branch} pass before it: "
                        f"let them run where that pass runs first"
                    )
                ran |= known - step.still

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that some step does not run."""
        return tuple(sorted({block for step in self.steps for block in step.still}))

    @property
    def has_cfg(self) -> bool:
        """Whether some step has CFG."""
        return any(step.cfg != "off" for step in self.steps)

    def reuses(self, name: Literal["cfg", "skip"]) -> bool:
        """Whether some step uses the last difference (`"cfg"`) or the last directions (`"skip"`) again."""
        return any(getattr(step, name) == "reused" for step in self.steps)

    def at(self, step: int, steps: int) -> PassStep:
        """What runs at step `step` (from 0) of `steps`.

        Raises:
            SkipError: for a run with another number of steps.
        """
        if steps != len(self.steps):
            raise SkipError(
                f"this PassSchedule is for {len(self.steps)} steps, and the run has {steps}: call the pipeline with "
                f"num_inference_steps={len(self.steps)}, or tune a schedule for that number"
            )
        return self.steps[step]

    def keeps(self, step: int, branch: Branch) -> frozenset[int]:
        """The blocks of which that pass of a step keeps what they add, where they run, for a later one."""
        found: set[int] = set()
        done: set[int] = set()
        for later in self.steps[step + 1 :]:
            if later.runs(branch):
                found |= set(later.reused) - done
                done |= set(self.blocks) - later.still
        return frozenset(found)

    def _heading(self) -> str:
        return f"PassSchedule of {len(self.steps)} steps"

    def _rows(self) -> list[Row]:
        rows = [(n, each.cfg, each.skip, each.reused, each.left_out) for n, each in enumerate(self.steps)]
        return [("step", "cfg", "skip", "blocks reused", "blocks left out"), *rows]
