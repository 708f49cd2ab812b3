"""Block choices: which blocks of a step's passes run, which add again what they added before, which add nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, get_args

import torch
from torch import Tensor, nn

from skipguide.active import ActivePlan, Call
from skipguide.arguments import sequence_like
from skipguide.blocks import Block
from skipguide.errors import SkipError
from skipguide.interventions import SkipBlock
from skipguide.pipelines.pass_schedule import Branch, PassSchedule, PassStep
from skipguide.plan import SkipPlan
from skipguide.planned import refuse_shared
from skipguide.skipper import Skipper


class EveryBlock:
    """No choices: every block runs.

    Attributes:
        installed: what has to be installed for the choices.
        answered: batch rows of blocks that did not run, in the running pass.
    """

    installed: tuple[Skipper, ...] = ()
    answered = 0

    def begin(self, step: int) -> None:
        """A step begins; what no step from here on uses again is let go of."""

    def forget(self) -> None:
        """Let go of what is kept: a run begins, is over, or has failed."""

    def refuse_unseen(self, unseen: bool) -> None:
        """Refuse blocks that run inside a graph of the whole model."""

    def running(self, branches: Sequence[str]) -> AbstractContextManager[None]:
        """The choices hold for a pass with the rows of these branches."""
        return nullcontext()


class BlockChoices(EveryBlock):
    """The choices of a schedule on one denoiser, under the other plans of a pass.

    Args:
        model: the denoiser.
        schedule: which blocks run at which step.

    Raises:
        SkipError: for blocks that the model does not have, or cannot do without.
    """

    def __init__(self, model: nn.Module, schedule: PassSchedule) -> None:
        self.schedule = schedule
        self.skipper = Skipper(model, SkipPlan())
        self.installed = (self.skipper,)
        chosen = self.skipper.map.select(schedule.blocks)
        refuse_shared(self.skipper.map, chosen)
        for block in chosen:
            self.skipper.active.interventions[id(block.module)] = ChosenBlock(block, self)
        self.now = PassStep()
        self.branches: tuple[str, ...] = ()  # whose rows the running pass has, one after the other
        self.kept: dict[tuple[str, int], Any] = {}
        self._keeps: dict[Branch, frozenset[int]] = {}

    def begin(self, step: int) -> None:
        """A step begins; what no step from here on uses again is let go of."""
        self.now = self.schedule.steps[step]
        self._keeps = {branch: self.schedule.keeps(step, branch) for branch in get_args(Branch)}
        for key in [key for key in self.kept if not any(key[1] in each.reused for each in self.schedule.steps[step:])]:
            del self.kept[key]

    def forget(self) -> None:
        """Let go of what is kept: a run begins, is over, or has failed."""
        self.kept.clear()

    def refuse_unseen(self, unseen: bool) -> None:
        """Refuse blocks that run inside a graph of the whole model.

        Raises:
            SkipError: saying so.
        """
        if unseen:
            raise SkipError("a schedule chooses blocks at every step anew, which a graph of the whole model cannot")

    @contextmanager
    def running(self, branches: Sequence[str]) -> Iterator[None]:
        """The choices hold for a pass with the rows of these branches."""
        self.branches, self.answered = tuple(branches), 0
        with self.skipper.running():
            yield

    def holds(self, block: int) -> bool:
        """Whether what a block added is known of all branches of the running pass."""
        return all((branch, block) in self.kept for branch in self.branches)

    def wanted(self, block: int) -> bool:
        """Whether what it adds now will be used again."""
        return any(block in self._keeps[_kind(branch)] for branch in self.branches)

    def keep(self, block: int, added: Any) -> None:
        """Take over what a block has added, for each branch apart."""
        for number, branch in enumerate(self.branches):
            self.kept[branch, block] = _rows_of(added, number, len(self.branches))

    def added(self, block: int) -> Any:
        """What a block added when it last ran, for the rows of all branches."""
        first, *others = (self.kept[branch, block] for branch in self.branches)
        for other in others:
            first = _paired(lambda a, b: torch.cat([a, b]), first, other)
        return first


def choices_of(model: nn.Module, schedule: PassSchedule | None) -> EveryBlock:
    """The choices of a schedule on a denoiser; without blocks in it none."""
    return BlockChoices(model, schedule) if schedule is not None and schedule.blocks else EveryBlock()


class ChosenBlock:
    """A block that some steps do not run."""

    __slots__ = ("choices", "index", "left_out")

    def __init__(self, block: Block, choices: BlockChoices) -> None:
        self.left_out = SkipBlock(block, counted=0)
        self.choices = choices
        self.index = block.index

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block, or return what enters it, with or without what it added last."""
        choices, index = self.choices, self.index
        if index in choices.now.left_out:
            choices.answered += plan.present
            return self.left_out(plan, call, args, kwargs)
        if index in choices.now.reused and choices.holds(index):
            choices.answered += plan.present
            return _paired(torch.add, self.left_out(plan, call, args, kwargs), choices.added(index))
        if not choices.wanted(index):
            return call(*args, **kwargs)
        entered = self.left_out(plan, call, args, kwargs)
        out = call(*args, **kwargs)
        choices.keep(index, _paired(torch.sub, out, entered))
        return out


def _kind(branch: str) -> Branch:
    """Which pass a branch is, by its name under a pipeline or a guider."""
    return "uncond" if "uncond" in branch else "skip" if branch.startswith("skip") else "cond"


def _rows_of(added: Any, number: int, count: int) -> Any:
    """The rows of one of `count` branches, which lie one after the other."""
    if isinstance(added, (tuple, list)):
        return sequence_like(added, (_rows_of(each, number, count) for each in added))
    return added.chunk(count)[number] if isinstance(added, Tensor) else added


def _paired(join: Callable[[Tensor, Tensor], Tensor], a: Any, b: Any) -> Any:
    """Something of two outputs of a block, tensor by tensor."""
    if isinstance(a, (tuple, list)):
        return sequence_like(a, (_paired(join, x, y) for x, y in zip(a, b, strict=True)))
    if a is None or isinstance(a, Tensor):
        return a if a is None else join(a, b)
    raise SkipError(f"a block that returns {type(a).__name__} cannot be used again by a PassSchedule: let it run")
