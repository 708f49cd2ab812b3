"""Skip: a plan on a model, active inside a `with` block, without a trace after it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from skipguide.active import LOCK, ActivePlan, Entry
from skipguide.blocks import Block, BlockMap, find_blocks
from skipguide.errors import SkipError
from skipguide.gate import Gate, Installation, gate_of
from skipguide.hosts.compiled import has_compiled
from skipguide.interventions import ShareRows
from skipguide.perturbations.grid import GridReader
from skipguide.plan import SkipPlan
from skipguide.planned import PlannedInterventions
from skipguide.prefix import Prefix
from skipguide.shown import Row, Shown, ledger_rows, passes
from skipguide.skipper_pass import SkipperPass
from skipguide.stats import Stats

logger = logging.getLogger(__name__)


class Skipper(Shown):
    """Leaves out what a plan names while the `with` block runs.

    Inside the block, `model(...)`, `model.generate(...)` or a pipeline around the model run without the named layers,
    in this thread or task only. Nested blocks add up. On leaving, also by an exception, the model is as it was.

    Args:
        model: a model whose blocks are known (`find_blocks`).
        plan: what to leave out; an empty plan changes nothing, to the bit.
        capture: a `Prefix` to fill with the streams that enter its layer, or several.
        resume: a filled `Prefix` to start from; the blocks before its layer do not run.
        share: block -> for each row of the batch the row whose result it has; a block runs for the rows that are
            their own source only.

    Attributes:
        stats: the ledger (`.calls`, `.skipped_fraction`).

    Raises:
        SkipError: at once, for a layer, part or stack that the model does not have.
        LostGateError: when a gate was replaced, so that the skip would silently not happen.

    Example:
        >>> import torch
        >>> from diffusers import LTXVideoTransformer3DModel
        >>> model = LTXVideoTransformer3DModel(in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2,
        ...     attention_head_dim=8, cross_attention_dim=16, caption_channels=8)
        >>> with Skipper(model, SkipPlan([1], part="attn")) as skipper:
        ...     _ = model(torch.randn(1, 8, 4), torch.randn(1, 3, 8), torch.tensor([500.0]), None, 2, 2, 2)
        >>> skipper.stats.calls["transformer_blocks.0"], skipper.stats.skips
        (1, {'transformer_blocks.1.attn1': 1})
    """

    def __init__(
        self,
        model: nn.Module,
        plan: SkipPlan,
        *,
        capture: Prefix | Sequence[Prefix] | None = None,
        resume: Prefix | None = None,
        share: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        if not isinstance(plan, SkipPlan):
            raise SkipError(f"expected a SkipPlan, such as SkipPlan([3, 5]); got {type(plan).__name__}")
        self.model = model
        self.plan = plan
        self.map = find_blocks(model)
        self.stats = Stats()
        root = self._root_gate = gate_of(self.map.model)
        self.active = ActivePlan(root, self.stats)
        planned = PlannedInterventions(self.map, self.stats)
        for prefix in (capture,) if isinstance(capture, Prefix) else capture or ():
            planned.capture(prefix)
        if resume is not None:
            planned.resume(resume, plan)
        for layer, rows in (share or {}).items():
            block = self.map.select([layer])[0]
            planned.add(block.module, block.name, ShareRows(block, rows))
        for term in plan.terms:
            planned.skip(term)
        self._windows = planned.windows
        self._progress: float | None = None
        self._root = SkipperPass(self, self.map.model, planned.modules)
        if planned.needs_grid and self.map.spec.grid is not None:
            self._root.grid = GridReader(self.map.spec.grid, self.map.model)
        # a wrapper of the model has a gate too: drivers listen there
        outer = [] if model is self.map.model else [gate_of(model)]
        self.gates: list[Gate] = [*outer, root, *(gate_of(module) for module in planned.modules.values())]
        self._installation = Installation(self.gates, inside=root)
        self._passed_by = 0
        self._kept = False  # installed by `install`, whether or not somebody is inside
        # a module that only serves a skipped sublayer is no entry of the ledger
        counted = {name: module for name, module in planned.modules.items() if name not in planned.helpers}
        self.active.names.update({id(module): name for name, module in counted.items()})
        self.active.interventions.update(planned.interventions)
        self.active.interventions[root.key] = self._root
        self._root.lists = {
            name: len(self.map.model.get_submodule(name)._modules)
            for name in {block.name.rpartition(".")[0] for block in self.map}
        }
        acted = [block for block in self.map if id(block.module) in planned.interventions]
        self._root.blocks = {id(block.module): block.name for block in acted if _places(self.map, block) == 1}

    def __del__(self) -> None:
        """A Skipper that was dropped inside its `with` block ends its plan and lets go of the model."""
        if (active := self.__dict__.get("active")) is not None:
            active.abandon()

    def __enter__(self) -> Skipper:
        """Install the gates and activate the plan in this thread or task."""
        entry = Entry(self.active)
        try:
            # entered first: whoever leaves in another thread then lets the gates stand
            self._passed_by = self._root_gate.passed_by
            entry.enter()
            self._root.steady = False
            self._installation.install()
            return self
        except BaseException:
            self._leave(entry)
            raise

    def __exit__(self, kind: type[BaseException] | None = None, *exc: object) -> None:
        """Deactivate the plan and remove what nobody else uses; a block without a pass under the plan is logged."""
        if (entry := self.active.last_entry()) is None:
            return
        try:
            self._leave(entry)
        except BaseException:  # Ctrl-C: what was broken off is done again
            self._leave(entry)
            raise
        if kind is None:
            self._check_effect()

    def _heading(self) -> str:
        held = "installed" if self.active.live or self._kept else "not entered"
        return f"Skipper on {type(self.map.model).__name__} ({held}), {passes(self.stats.passes)}: {self.plan}"

    def _rows(self) -> list[Row]:
        return ledger_rows(self.stats.calls, self.stats.skips)

    def _check_effect(self) -> None:
        """Say so if no pass was made under the plan; what a compiled graph runs is not counted.

        It is no error: other threads may run the model whole on purpose.
        """
        stats = self.stats
        if self.plan.empty or stats.passes or stats.calls or stats.skips or has_compiled():
            return
        elsewhere = self._root_gate.passed_by - self._passed_by
        logger.warning(
            "the Skipper's `with` block ended, and %s was never called under its plan%s",
            type(self.map.model).__name__,
            f": all {elsewhere} passes ran with the whole model, in threads that have not entered it. Enter the "
            f"Skipper in the thread that runs the model"
            if elsewhere
            else ": was another object called, such as a copy of the model?",
        )

    def _leave(self, entry: Entry) -> None:
        """Take one entry back, and the gates if it was the last one; it can be repeated."""
        with LOCK:
            entry.leave()
            if not (self._kept or self.active.entries):
                self._installation.remove()

    def install(self) -> None:
        """Put the gates in place without activating the plan; `running()` activates it for one pass.

        For drivers, which call `move_in_front()` where modules can have been compiled or offloaded since.
        """
        self._root.steady = True
        self._kept = True
        self._installation.install()

    def move_in_front(self) -> None:
        """Put the gates in front of what came while they stood: a compiled call, or group offloading."""
        self._root.move_in_front()

    def remove(self) -> None:
        """End the plan in this thread and give the gates up; a second call does nothing.

        What others have applied stays. Where other threads are inside the `with` block, the last takes the gates away.
        """
        self._kept = False
        self.active.leave_all()
        with LOCK:
            if not self.active.entries:
                self._installation.remove()

    @contextmanager
    def running(self) -> Iterator[Skipper]:
        """Activate the plan for passes inside this block; the gates must be installed."""
        entry = Entry(self.active)
        try:
            entry.enter()
            yield self
        finally:
            try:
                entry.leave()
            except BaseException:  # Ctrl-C: what was broken off is done again
                entry.leave()
                raise

    @property
    def progress(self) -> float | None:
        """Fraction of the sampling steps done, 0 to 1; needed by plans with a window.

        Raises:
            SkipError: on setting, for anything that is no such fraction.
        """
        return self._progress

    @progress.setter
    def progress(self, value: float) -> None:
        try:
            value = float(value)
        except (TypeError, ValueError):
            value = math.nan
        if not 0 <= value <= 1:  # NaN neither: no window would contain it
            raise SkipError("progress is the fraction of the steps done, 0 to 1: set it to step / steps")
        self._progress = value
        for condition, window in self._windows.items():
            self.active.holds[condition] = window.contains(value)


def _places(blocks: BlockMap, block: Block) -> int:
    """At how many places of the model the block's module stands."""
    return sum(other.module is block.module for other in blocks)


def capture(model: nn.Module, prefix: Prefix) -> AbstractContextManager[Skipper]:
    """Fill `prefix` on every pass of `model` inside the `with` block.

    Example:
        >>> from diffusers import LTXVideoTransformer3DModel
        >>> import torch
        >>> model = LTXVideoTransformer3DModel(in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2,
        ...     attention_head_dim=8, cross_attention_dim=16, caption_channels=8).eval()
        >>> call = (torch.randn(1, 8, 4), torch.randn(1, 3, 8), torch.tensor([500.0]), None, 2, 2, 2)
        >>> prefix = Prefix(layer=2)
        >>> with torch.no_grad(), capture(model, prefix):
        ...     full = model(*call).sample
        >>> with torch.no_grad(), resume(model, prefix) as skipper:
        ...     again = model(*call).sample
        >>> torch.equal(full, again), list(skipper.stats.calls)
        (True, ['transformer_blocks.2'])
    """
    return Skipper(model, SkipPlan(), capture=prefix)


def resume(model: nn.Module, prefix: Prefix) -> AbstractContextManager[Skipper]:
    """Run `model` from the captured point on: blocks before `prefix.layer` do not run.

    The result is bit-identical to the full pass at the same batch, and equal to rounding for other batch sizes.

    Raises:
        SkipError: if nothing was captured yet.
    """
    if not prefix.streams:
        raise prefix.unfilled()
    return Skipper(model, SkipPlan(), resume=prefix)
