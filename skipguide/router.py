"""Router: the input decides, row by row, which blocks run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from skipguide.active import ActivePlan, Call, Entry, Intervention, active_plans
from skipguide.arguments import Arguments
from skipguide.blocks import Block, find_blocks
from skipguide.errors import SkipError
from skipguide.gate import Installation, gate_of
from skipguide.model_pass import ModelPass
from skipguide.rows import run_rows
from skipguide.sequential import InPlaceSequential, find_sequentials
from skipguide.stats import Stats

# Called with the place in the router's blocks and the stream that enters the block, `[B, ...]`.
Decide = Callable[[int, Tensor], Tensor | None]


class Router:
    """Runs every block of a model only for the batch rows that a decision keeps.

    Args:
        model: a model whose blocks are known (`find_blocks`) and have one stream.
        blocks: those that can be skipped; every block by default.

    Inside `with router.running(decide) as stats:`, `decide(i, x)` is asked when `blocks[i]` is reached. It returns

    - None: the block runs as without a router;
    - bool `[B]`: it runs for the rows that are True, and for no others;
    - float `[B]`: it runs for every row, and the output is `d * block(x) + (1 - d) * shortcut(x)`: what a decision
      that learns needs.

    The gates stand on the model while a `running` block is active, and leave no trace after it; `install()` keeps them
    there between blocks. Threads that route the same model do not see each other. `x` is given to look at: in a
    `nn.Sequential` of blocks the rows that run are written into it afterwards, so what is kept of it is a copy.

    Raises:
        SkipError: for blocks with several streams, or a decision of another shape or dtype.

    Example:
        >>> from skipguide import BlockSpec, register_blocks
        >>> class Tiny(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
        ...     def forward(self, input):
        ...         for layer in self.layers:
        ...             input = layer(input)
        ...         return input
        >>> register_blocks(Tiny, BlockSpec("layers", streams=("input",)))
        >>> model = Tiny()
        >>> with Router(model).running(lambda i, x: x[:, 0] > 0 if i == 1 else None) as stats:
        ...     out = model(torch.randn(8, 2))
        >>> stats.rows["layers.0"], stats.rows.get("layers.1", 0) < 8
        (8, True)
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block] | None = None) -> None:
        found = find_blocks(model)
        self.model = found.model
        self.blocks = tuple(found) if blocks is None else tuple(blocks)
        if len({id(block.module) for block in self.blocks}) < len(self.blocks):
            raise SkipError(
                f"{type(model).__name__} has one module at several places (shared weights), and its calls cannot be "
                f"told apart: give each block a module of its own"
            )
        for block in self.blocks:
            if len(block.spec.streams) != 1:
                raise SkipError(
                    f"rows can be routed through blocks with one stream; {block.name} of {type(model).__name__} has "
                    f"{', '.join(block.spec.streams)}"
                )
        self._root = gate_of(self.model)
        found_sequentials = find_sequentials(self.model, [block.module for block in self.blocks])
        self._sequentials = {module: tuple(map(gate_of, blocks)) for module, blocks in found_sequentials.items()}
        self._block_gates = [gate_of(block.module) for block in self.blocks]
        self._shortcuts: list[nn.Module | None] = [block.shortcut for block in self.blocks]
        shared = [gate_of(module) for module in self._shortcuts if module is not None]
        self._all_gates = [self._root, *map(gate_of, self._sequentials), *self._block_gates, *shared]
        self._kept = Installation(self._all_gates)
        self._arguments = [Arguments(block.module) for block in self.blocks]
        self._names = {id(block.module): block.name for block in self.blocks}

    def install(self) -> None:
        """Put the gates in place and keep them there, for many short passes."""
        self._kept.install()

    def remove(self) -> None:
        """Give up the gates that `install` put in place; a second call does nothing."""
        self._kept.remove()

    @contextmanager
    def running(self, decide: Decide) -> Iterator[Stats]:
        """Route the passes of this thread or task inside the block; gives the ledger of the rows that ran."""
        stats = Stats()
        active = ActivePlan(self._root, stats)
        active.names = self._names
        active.renew = partial(self._interventions, decide)
        active.interventions = active.renew()
        entry, gates = Entry(active), Installation(self._all_gates)
        try:
            gates.install()
            entry.enter()
            yield stats
        finally:
            try:
                entry.leave()
                gates.remove()
            except BaseException:  # Ctrl-C: what was broken off is done again
                entry.leave()
                gates.remove()
                raise

    def _interventions(self, decide: Decide) -> dict[int, Intervention]:
        """The interventions by gate, for one pass at a time: they note what it may overwrite and has computed."""
        found: dict[int, Intervention] = {self._root.key: _RouterPass(self)}
        around: dict[int, InPlaceSequential] = {}
        for module, gates in self._sequentials.items():
            found[id(module)] = sequential = InPlaceSequential(gates)
            around |= {gate.key: sequential for gate in gates}
        for place, block in enumerate(self.blocks):
            sequential = around.get(id(block.module)) or InPlaceSequential(())
            rows = _RunRows(place, block, self._arguments[place], self._shortcuts[place], decide, sequential)
            found[id(block.module)] = rows
            if rows.once is not None:
                found[id(rows.shortcut)] = rows.once
        return found


class _RouterPass(ModelPass):
    """A pass under a router: it is counted, and a gate that was lost is noticed afterwards."""

    __slots__ = ("router",)

    def __init__(self, router: Router) -> None:
        self.router = router

    def open(self, plan: ActivePlan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count the pass."""
        super().open(plan, args, kwargs)
        plan.stats.passes += 1

    def close(self, plan: ActivePlan, out: Any) -> None:
        """Notice a gate that was lost."""
        for gate, block in zip(self.router._block_gates, self.router.blocks, strict=True):
            if gate.key not in plan.seen and not gate.reachable():
                raise gate.lost(block.name)


class _Once:
    """At a projection: gives what it returned on the skip path, so that it runs (and counts a batch) once."""

    __slots__ = ("known",)

    def __init__(self) -> None:
        self.known: Any = None

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return call(*args, **kwargs) if self.known is None else self.known


class _RunRows:
    """At a block: asks, and runs what the answer needs."""

    __slots__ = ("arguments", "block", "decide", "once", "place", "sequential", "shortcut", "stream")

    def __init__(
        self,
        place: int,
        block: Block,
        arguments: Arguments,
        shortcut: nn.Module | None,
        decide: Decide,
        sequential: InPlaceSequential,
    ) -> None:
        self.place = place
        self.block = block
        self.arguments = arguments
        self.shortcut = shortcut
        self.once = None if shortcut is None else _Once()
        self.decide = decide
        self.sequential = sequential
        self.stream = block.spec.streams[0]

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        alone = len(args) == 1 and not kwargs  # the stream, and nothing else
        x = args[0] if alone else self.arguments.get(self.stream, args, kwargs)
        decision = self.decide(self.place, x)
        own = self.sequential.take(x)
        if decision is None:
            return call(*args, **kwargs)
        rows = x.shape[0]
        if decision.shape != (rows,) or not (decision.dtype is torch.bool or decision.is_floating_point()):
            raise SkipError(
                f"a decision at {self.block.name} is bool or float of shape [{rows}], one per batch row; got "
                f"{decision.dtype} of shape {list(decision.shape)}"
            )
        if decision.dtype is not torch.bool:
            return self._blend(decision, x, call, args, kwargs)
        numbers = [row for row, runs in enumerate(decision.tolist()) if runs]  # the one wait for the device here
        if len(numbers) == rows:
            return call(*args, **kwargs)
        if not numbers:
            plan.stats.skipped(self.block.name, rows)
            if self.shortcut is not None:
                return self.shortcut(x)
            return self.sequential.keep(x) if own else x
        plan.stats.skipped(self.block.name, rows - len(numbers))
        if alone:
            return self.sequential.keep(
                run_rows(partial(_on_rows, plan, numbers, call), x, numbers, self.shortcut, own)
            )
        index = torch.tensor(numbers).to(x.device, non_blocking=True)
        spec = self.block.spec
        moved, named = self.arguments.rows(args, kwargs, index, rows, spec.shared, followed=spec.followed)

        def run(part: Tensor) -> Tensor:
            some, others = self.arguments.put({self.stream: part}, moved, named)
            return _on_rows(plan, numbers, call, *some, **others)

        return self.sequential.keep(run_rows(run, x, index, self.shortcut, own))

    def _blend(self, weight: Tensor, x: Tensor, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        passed = x
        if self.shortcut is not None and self.once is not None:
            passed = self.once.known = self.shortcut(x)
        try:
            ran: Tensor = call(*args, **kwargs)
        finally:
            if self.once is not None:
                self.once.known = None
        weight = weight.to(ran).view(-1, *[1] * (ran.ndim - 1))
        # lerp gives either end exactly where the weight is 0 or 1
        return torch.lerp(passed.to(ran.dtype), ran, weight)


def _on_rows(plan: ActivePlan, numbers: list[int], call: Call, *args: Any, **kwargs: Any) -> Tensor:
    """Call while the active plans know that only these rows are left, so that ledgers and row plans stay true."""
    before = plan.rows
    left = tuple(numbers) if before is None else tuple([before[n] for n in numbers])
    others = active_plans()
    if len(others) > 1:
        others = tuple([other for other in others if other.rows == before])
    try:
        for other in others:
            other.rows = left
        out: Tensor = call(*args, **kwargs)
        return out
    finally:
        for other in others:
            other.rows = before
