"""The forward passes of one denoiser under the plans of a step, each from where it first differs, in the ledger."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from itertools import repeat
from typing import Any

from torch import Tensor, nn

from skipguide.active import Call, active_plans
from skipguide.arguments import Arguments, batch_size
from skipguide.errors import SkipError
from skipguide.gate import Installation, gate_of
from skipguide.hosts.branch_states import BranchStates, states_of
from skipguide.hosts.diffusers_caches import reach_of
from skipguide.hosts.wrappers import unwrap
from skipguide.pipelines.pass_schedule import PassSchedule
from skipguide.pipelines.sampling.block_choices import choices_of
from skipguide.pipelines.sampling.ledger import GuidanceStats
from skipguide.pipelines.sampling.missing_blocks import BlockCount
from skipguide.pipelines.sampling.predictions import first
from skipguide.pipelines.sampling.prefix_caches import PrefixCaches
from skipguide.pipelines.sampling.row_inputs import foreign_inputs, refuse_foreign
from skipguide.pipelines.sampling.standing import Standing
from skipguide.pipelines.sampling.step_passes import NO_REACH, Skipped, StepPasses
from skipguide.pipelines.sampling.tail import Tail, fits, in_rows, index_of, part_of, sources
from skipguide.plan import SkipPlan
from skipguide.skipper import Skipper

KEPT = 16  # sets of passes that stay ready; blocks drawn anew at every step make one set per step
_ZEROS = repeat(0)  # the default of every look-up


class DenoiserPasses:
    """The forwards of one denoiser.

    Args:
        model: the denoiser.
        reuse: run skipped passes from where they first differ.
        stats: the ledger.
        touch: False leaves every block as it is and only lets the model's own gate listen.
        tail: whether skipped passes run with the plain one (see `skipguide.pipelines.sampling.tail`).
        schedule: where it says so, not every block of a pass runs.
    """

    def __init__(
        self,
        model: nn.Module,
        reuse: bool,
        stats: GuidanceStats,
        touch: bool = True,
        tail: Tail = "separate",
        schedule: PassSchedule | None = None,
    ) -> None:
        self.model = model
        self.reuse = reuse
        self.stats = stats
        self.touch = touch
        self.tail = tail
        self.bare = Skipper(model, SkipPlan())
        self._names = tuple(block.name for block in self.bare.map)
        self.blocks = len(self._names)
        self.count = BlockCount(model, self._names)
        self.cache: str | None = None
        self.reach = NO_REACH
        self.states: BranchStates = states_of(model, None)
        self.branch = "only"  # of the pipeline's call that is running
        self.choices = choices_of(model, schedule)
        self._arguments = Arguments(unwrap(model))
        self.prefixes = PrefixCaches(self._arguments, self.bare.map.spec.cache)
        self._prepared: OrderedDict[tuple[SkipPlan, ...], StepPasses] = OrderedDict()
        self._in_rows: dict[tuple[SkipPlan, int], Skipper] = {}
        self._wide: dict[tuple[StepPasses, int, int, int], Skipper] = {}
        self._listening = Installation([gate_of(model)])
        self._standing = Standing()

    def set_cache(self, cache: str | None) -> None:
        """Say which cache is on the model, or None, when a run begins: what it keeps of the last one is forgotten."""
        self.cache = cache
        self.forget()
        self.choices.refuse_unseen(self.count.unseen)
        self.states = states_of(self.model, cache)
        if cache is not None:
            self.states.reset()
        blocks = {id(block.module): block.name for block in self.bare.map}
        reach = NO_REACH if cache is None else reach_of(self.model, cache, blocks)
        if reach != self.reach:
            self.reach = reach
            while self._prepared:
                self._forget()

    # -- installation -------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Put the gates in place."""
        if self.touch:
            self._standing.install(self.bare, *self.choices.installed)
        else:
            self._listening.install()

    def remove(self) -> None:
        """Take everything away again."""
        self.clear()
        self.forget()
        self._standing.remove()
        self._listening.remove()
        self._prepared.clear()
        self._in_rows.clear()
        self._wide.clear()

    def pause(self) -> None:
        """Take the gates away. `reinstall` puts the same ones back, so that graphs compiled with them serve again."""
        self.clear()
        self._standing.pause()

    def reinstall(self) -> None:
        """Put back what `pause` took away; the first time, install."""
        self.count.renew()
        try:
            self._standing.reinstall([self.bare, *self.choices.installed])
        except BaseException:
            self.remove()
            raise

    def move_in_front(self, model: nn.Module) -> None:
        """Put the gates in front of what came since they were installed, once per call of the pipeline.

        Args:
            model: the pipeline's denoiser as it is now: the same one, maybe wrapped since.
        """
        self.count.renew(model)
        self._standing.move_in_front()

    def clear(self) -> None:
        """Let go of the activations that are held."""
        for step in self._prepared.values():
            step.clear()

    def forget(self) -> None:
        """Let go of what was kept for later steps."""
        self.states.forget()
        self.choices.forget()
        self.prefixes.forget()

    def fail(self) -> None:
        """Let go of everything that the run has left: it is over."""
        self.clear()
        self.forget()
        self.states.reset()

    def prepared(self, plans: Sequence[SkipPlan]) -> StepPasses:
        """The passes for these plans, ready to run; the ones used last are kept."""
        key = tuple(dict.fromkeys(plans))
        if key not in self._prepared:
            step = StepPasses(self.model, key, self.blocks, self.reuse, self.reach)
            self._standing.install(*step.installed)
            self._prepared[key] = step
            if len(self._prepared) > KEPT:
                self._forget()
        self._prepared.move_to_end(key)
        return self._prepared[key]

    def _forget(self) -> None:
        """Let go of the set that was used longest ago."""
        _, old = self._prepared.popitem(last=False)
        wide = [self._wide.pop(key) for key in tuple(self._wide) if key[0] is old]
        for skipper in (*old.installed, *wide):
            self._standing.remove(skipper)

    # -- passes -------------------------------------------------------------------------------------------------

    def rows(self, args: Any, kwargs: Any, rows: slice | Tensor, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call for some rows of the batch."""
        spec = self.bare.map.spec
        refuse_foreign(foreign_inputs(self._arguments, spec, args, kwargs, batch), batch, "this step")
        return self._arguments.rows(args, kwargs, rows, batch, spec.shared, spec.listed, spec.folded, 0, spec.layered)

    def plain(
        self,
        call: Call,
        args: Any,
        kwargs: Any,
        clips: int,
        *,
        step: StepPasses | None = None,
        rows: slice | None = None,
        counted: int = 1,
        ran: int = 0,
    ) -> Any:
        """A pass with every block.

        Args:
            call: the denoiser.
            args: of the call.
            kwargs: of the call.
            clips: how many clips the batch is for.
            step: capture what its skipped passes start from.
            rows: those that the skipped passes are variants of; with them, skipped passes may run along (`tail`).
            counted: how many branches of the pipeline's own it stands for.
            ran: how many of them it really computes; 0 is all.
        """
        planned = (ran or counted) * self.blocks
        self.prefixes.meet(self.branch, None, args, kwargs)
        if step is not None and rows is not None and self._together(step, args, kwargs, rows):
            return self._with_tails(step, call, args, kwargs, clips, rows, counted, planned)
        skipper = self.bare if step is None else step.plain
        return self._pass(skipper, call, args, kwargs, clips, counted, planned)

    def _together(self, step: StepPasses, args: Any, kwargs: Any, rows: slice) -> bool:
        if self.tail == "separate":
            return False
        if self.prefixes.mode(args, kwargs) is not None:
            if self.tail == "batched":
                raise SkipError(
                    "tail='batched' and a denoiser that keeps keys and values of the first step: each pass "
                    "has its own; leave tail at 'auto'"
                )
            return False
        batch = batch_size(args, kwargs)
        foreign = foreign_inputs(self._arguments, self.bare.map.spec, args, kwargs, batch)
        if self.tail == "batched":
            refuse_foreign(foreign, batch, "tail='batched'")
            return True
        copies = len(step.shared) * (rows.stop - rows.start)
        hidden = self._arguments.get(self._arguments.names[0], args, kwargs)
        return self.cache is None and not foreign and fits(self.model, hidden, batch + copies)

    def _with_tails(
        self, step: StepPasses, call: Call, args: Any, kwargs: Any, clips: int, rows: slice, counted: int, planned: int
    ) -> Any:
        """The plain pass with the skipped ones in its batch; their predictions are kept for `skipped`."""
        batch, copies = batch_size(args, kwargs), len(step.shared)
        total, own = batch + copies * (rows.stop - rows.start), rows.stop - rows.start
        key = (step, batch, rows.start, rows.stop)
        if key not in self._wide:
            share = sources(step.shared, rows, batch, self.blocks)
            self._wide[key] = Skipper(self.model, in_rows(step.shared, batch, own), share=share)
            self._standing.install(self._wide[key])
        index = index_of(rows, batch, copies)
        args, kwargs = self.rows(args, kwargs, index, batch)
        planned += sum(each.blocks for each in step.shared)
        out = self._pass(self._wide[key], call, args, kwargs, clips, counted, planned)
        step.ready = {
            plan: first(part_of(out, slice(batch + number * own, batch + (number + 1) * own), total))
            for number, plan in enumerate(step.plans)
        }
        self.stats.batched += 1
        self.stats.blocks_naive += copies * self.blocks
        return part_of(out, slice(0, batch), total)

    def skipped_inside(
        self, plan: SkipPlan, half: int, call: Call, args: Any, kwargs: Any, clips: int, counted: int = 2
    ) -> Any:
        """A pass in which the first `half` rows of the batch skip; 0 is all rows."""
        self.prefixes.meet(self.branch, plan, args, kwargs)
        if (plan, half) not in self._in_rows:
            rows = replace(plan, rows=tuple(range(half)) if half else None)
            self._in_rows[plan, half] = Skipper(self.model, rows)
            self._standing.install(self._in_rows[plan, half])
        removed = len(plan.layers) if plan.perturbation.removes else 0
        skipper = self._in_rows[plan, half]
        return self._pass(skipper, call, args, kwargs, clips, counted, counted * self.blocks - removed)

    def skipped(self, step: StepPasses, call: Call, args: Any, kwargs: Any, rows: slice, batch: int) -> Skipped:
        """The predictions without the layers, from where they first differ from an earlier pass.

        Args:
            step: its passes; the plain one has run.
            call: the denoiser.
            args: of the call, for `rows` only.
            kwargs: of the call, for `rows` only.
            rows: the rows of the plain pass that are skipped.
            batch: how many rows the plain pass had.
        """
        if step.ready is not None:
            found = step.ready
            step.clear()
            return found
        began = time.perf_counter()
        out: Skipped = {}
        try:
            for number, plan in enumerate(step.plans):
                out[plan] = first(self.skipped_pass(step, number, call, args, kwargs, rows, batch))
        finally:
            step.clear()
        self.stats.seconds += time.perf_counter() - began
        return out

    def skipped_pass(
        self, step: StepPasses, number: int, call: Call, args: Any, kwargs: Any, rows: slice, batch: int
    ) -> Any:
        """One skipped pass of a step, whose plain pass and earlier skipped ones have run; arguments as in `skipped`."""
        clips, branch = rows.stop - rows.start, f"skip_{number}" if number else "skip"
        skipper, own, planned = step.take_up(number, rows, batch, clips)
        args, kwargs = self.prefixes.own(self.branch, step.plans[number], args, kwargs)
        out = self._pass(skipper, call, args, kwargs, clips, 0, planned, branch)
        self.prefixes.take(self.branch, step.plans[number], args, kwargs, out)
        if own is not None:
            own.clear()
        self.stats.blocks_naive += self.blocks
        return out

    def _pass(
        self,
        skipper: Skipper,
        call: Call,
        args: Any,
        kwargs: Any,
        clips: int,
        counted: int,
        planned: int,
        branch: str = "",
    ) -> Any:
        rows, what = skipper.stats.rows, "a pass of the pipeline" if counted else "a skipped pass"
        before, alone = sum(map(rows.get, self._names, _ZEROS)), self.cache is None and not active_plans()
        # the branches whose rows these are: where the pipeline asks for both, the second alone can be computed
        both = not branch and self.branch == "both"
        mine = ("uncond", "cond")[-(planned // self.blocks) :] if both else (branch or self.branch,)
        try:
            with self.states.branch(branch or self.branch), self.choices.running(mine), skipper.running():
                out = call(*args, **kwargs)
        except Exception as error:
            if alone and not counted:
                self.count.refuse_failure(error, sum(map(rows.get, self._names, _ZEROS)) - before, planned)
            raise
        ran = sum(map(rows.get, self._names, _ZEROS)) - before  # of whole blocks: a sublayer has an entry of its own
        answered = self.choices.answered
        if alone and ran + answered < planned * clips:  # neither a cache nor somebody else's plan leaves blocks out
            self.count.refuse(ran // clips, planned, what)
        # in a compiled graph nothing is counted, so the planned number stands for it; a cache may really run no block
        answers = self.cache is not None and not self.count.unseen
        run = ran // clips if ran or answers or answered else planned
        self.stats.blocks_cached += max(planned - run, 0) if answers else 0
        self.enter(counted, run)
        return out

    def enter(self, counted: int, ran: int | None = None, passes: int = 1) -> None:
        """Enter one forward that stands for `counted` plain passes and ran so many blocks; None: they ran whole."""
        plain = counted * self.blocks
        self.stats.passes += passes
        self.stats.blocks_run += plain if ran is None else ran
        self.stats.blocks_plain += plain
        self.stats.blocks_naive += plain
