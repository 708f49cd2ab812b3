"""Step passes: the plain pass of a step, which captures, and the skipped passes that are taken up from it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from skipguide.hosts.diffusers_caches import Reach
from skipguide.pipelines.sampling.shared_prefixes import PLAIN, SharedPass, share_prefixes, shared_under
from skipguide.plan import SkipPlan
from skipguide.prefix import Prefix
from skipguide.skipper import Skipper

NO_REACH = Reach()

Skipped = dict[SkipPlan, Tensor]  # what is skipped -> the prediction without it


class StepPasses:
    """The plain pass of a step, which captures, and the skipped passes after it.

    Where a cache answers the plain pass, nothing is captured: a skipped pass that it does not answer then runs from the
    beginning, or from behind the blocks that run in every pass (`late`).
    """

    def __init__(
        self, model: nn.Module, plans: Sequence[SkipPlan], blocks: int, reuse: bool, reach: Reach = NO_REACH
    ) -> None:
        self.plans = tuple(plans)
        self.reach = reach
        self.shared: tuple[SharedPass, ...] = shared_under(reach, plans, blocks, reuse)
        self.captured = {
            (each.parent, each.start): self._prefix(each.start) for each in self.shared if each.start is not None
        }
        self.replayed = [self._prefix(each.start) if each.start is not None else None for each in self.shared]
        self.late: list[tuple[Skipper, Prefix | None, int] | None] = [
            self._late(model, each, plan, blocks) for each, plan in zip(self.shared, self.plans, strict=True)
        ]
        self.ready: Skipped | None = None  # the predictions, where the skipped rows ran in the plain pass's batch
        self.plain = Skipper(model, SkipPlan(), capture=self._from(PLAIN))
        self.skippers = [
            Skipper(model, each.plan, capture=self._from(number), resume=self.replayed[number])
            for number, each in enumerate(self.shared)
        ]

    def _prefix(self, start: int) -> Prefix:
        first = self.reach.first
        return Prefix(start, heard=(first - 1,) if 0 < first <= start else ())

    def _late(
        self, model: nn.Module, shared: SharedPass, plan: SkipPlan, blocks: int
    ) -> tuple[Skipper, Prefix | None, int] | None:
        """How a skipped pass runs when the plain one was answered: its plan, where it starts, how many blocks."""
        first = self.reach.first
        if shared.start is None or not self.reach.blocks or shared.start < first:
            return None
        whole = share_prefixes([plan], blocks, reuse=False)[0]
        if not first:
            return Skipper(model, whole.plan), None, whole.blocks
        self.captured.setdefault((PLAIN, first), self._prefix(first))
        own = self._prefix(first)
        return Skipper(model, whole.plan, resume=own), own, whole.blocks - first

    @property
    def installed(self) -> list[Skipper]:
        """What has to be installed for these passes."""
        return [self.plain, *self.skippers, *(late[0] for late in self.late if late is not None)]

    def take_up(self, number: int, rows: slice, batch: int, clips: int) -> tuple[Skipper, Prefix | None, int]:
        """Fill what a skipped pass starts from, and say under which plan it runs, from where, and how many blocks.

        Args:
            number: of the pass.
            rows: those of the plain pass that it is a variant of.
            batch: how many rows the plain pass had.
            clips: how many it has itself.
        """
        shared, own = self.shared[number], self.replayed[number]
        if own is None or shared.start is None:
            return self.skippers[number], None, shared.blocks
        source, late = self.captured[shared.parent, shared.start], self.late[number]
        if late is not None and not source.streams:
            skipper, own, planned = late
            if own is not None:
                own.fill(self.captured[PLAIN, own.layer].select(rows, batch))
            return skipper, own, planned
        here = (rows, batch) if shared.parent == PLAIN else (slice(0, clips), clips)
        own.fill(source.select(*here))
        return self.skippers[number], own, shared.blocks

    def _from(self, number: int) -> list[Prefix]:
        return [prefix for (parent, _), prefix in self.captured.items() if parent == number]

    def clear(self) -> None:
        """Let go of the activations."""
        late = [each[1] for each in self.late if each is not None]
        for prefix in (*self.captured.values(), *self.replayed, *late):
            if prefix is not None:
                prefix.clear()
        self.ready = None
