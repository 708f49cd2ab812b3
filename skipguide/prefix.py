"""Resume: start a model from the middle. The streams that enter block k are captured once, and given to it again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from skipguide.active import ActivePlan, Call
from skipguide.arguments import Arguments, cloned, sequence_like
from skipguide.blocks import Block
from skipguide.errors import SkipError

# a condition of a running pass: the model writes into what its modules return
WRITTEN = "written"


@dataclass
class Prefix:
    """The streams that enter one block: references to the tensors of the pass that captured them.

    Attributes:
        layer: the block, in execution order.
        streams: stream name -> tensor, as the block received it. Empty until a pass was captured.
        kept: name of an earlier block -> what it returned, for blocks that the model hears from again later; and of
            `sublayers`.
        source: the model that it is captured from; None where nobody said.
        sublayers: paths of sublayers of the block itself that a pass resumed from it has in common with the pass that
            was captured: it gets their results, and they do not run.
        heard: earlier blocks whose results something in front of the blocks goes by, such as a cache that decides by
            what the first block adds: a resumed pass gives them again. If the last of them stands just before `layer`,
            the pass goes on from it even where nothing was captured at `layer`.
    """

    layer: int
    streams: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    source: ref[nn.Module] | None = field(default=None, repr=False, compare=False)
    sublayers: tuple[str, ...] = ()
    heard: tuple[int, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """Which model it was is true of this process only."""
        return {**self.__dict__, "source": None}

    def select(self, rows: slice, batch: int) -> Prefix:
        """This prefix for some rows of the batch, as views.

        Args:
            rows: slice of the model's batch.
            batch: the model's batch size when the prefix was captured.

        Raises:
            SkipError: for rows that the batch does not have, or none.
        """
        if not self.streams and not self.goes_on:
            raise self.unfilled()
        if not isinstance(rows, slice):
            raise SkipError(f"expected a slice of the batch, such as slice(0, 1); got {rows!r}")
        first, last, step = rows.indices(batch)
        if step != 1 or first >= last or max(rows.start or 0, rows.stop or 0) > batch:
            raise SkipError(f"expected some of the {batch} rows of the batch, one after the other; got {rows}")

        views: dict[int, Tensor] = {}  # what a module returned twice is one tensor again

        def rows_of(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return sequence_like(value, (rows_of(item) for item in value))
            if value is None:
                return None
            if id(value) not in views:
                fold = value.shape[0] // batch  # Latte folds frames or positions into the batch
                views[id(value)] = value[first * fold : last * fold]
            return views[id(value)]

        streams = {name: rows_of(tensor) for name, tensor in self.streams.items()}
        kept = {name: rows_of(value) for name, value in self.kept.items()}
        return Prefix(self.layer, streams, kept, self.source, self.sublayers, self.heard)

    @property
    def goes_on(self) -> bool:
        """Whether the block before `layer` gives its result again, so that what enters `layer` follows from it."""
        return self.layer - 1 in self.heard and bool(self.kept)

    def unfilled(self) -> SkipError:
        """The error for a prefix that no pass has filled yet."""
        return SkipError(
            f"nothing was captured at block {self.layer}: run the model once inside capture(model, prefix)"
        )

    def fill(self, other: Prefix) -> None:
        """Take over what another prefix of the same layer holds."""
        self.streams.update(other.streams)
        self.kept.update(other.kept)

    def clear(self) -> None:
        """Let go of the tensors."""
        self.streams.clear()
        self.kept.clear()


class Capture:
    """Keeps the streams that enter a block, and runs it."""

    __slots__ = ("arguments", "prefix", "streams")

    def __init__(self, block: Block, prefix: Prefix) -> None:
        self.arguments = Arguments(block.module)
        self.streams = block.spec.streams
        self.prefix = prefix

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Store references, no copies: blocks do not write into their inputs."""
        # a new dict, so that a compiled pass does not depend on what the old one held
        self.prefix.streams = {name: self.arguments.get(name, args, kwargs) for name in self.streams}
        return call(*args, **kwargs)


class Keep:
    """Runs a block, or a sublayer, and keeps what it returns, which is read again later."""

    __slots__ = ("name", "prefix")

    def __init__(self, name: str, prefix: Prefix) -> None:
        self.name = name
        self.prefix = prefix

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Store a reference to the output, or a copy where the model goes on to write into it."""
        out = call(*args, **kwargs)
        self.prefix.kept[self.name] = cloned(out) if plan.holds.get(WRITTEN) else out
        return out


class Replay:
    """In place of a block or a sublayer that does not run: what it returned when it did."""

    __slots__ = ("arguments", "name", "prefix", "stream")

    def __init__(self, name: str, module: nn.Module, prefix: Prefix, padded: str | None = None) -> None:
        """Read the module's arguments.

        Args:
            name: of the block or sublayer.
            module: itself.
            prefix: what was kept.
            padded: its argument whose length the result has, where that can differ from what was kept.
        """
        self.arguments = Arguments(module)
        self.name = name
        self.prefix = prefix
        self.stream = padded

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what was kept."""
        if self.name not in self.prefix.kept:
            raise self.prefix.unfilled()
        out = self.prefix.kept[self.name]
        if plan.holds.get(WRITTEN):
            out = cloned(out)
        return out if self.stream is None else out[:, : self.arguments.get(self.stream, args, kwargs).shape[1]]


class Inject:
    """Gives a block the streams that were captured, whatever came in."""

    __slots__ = ("arguments", "padded", "prefix")

    def __init__(self, block: Block, prefix: Prefix) -> None:
        self.arguments = Arguments(block.module)
        self.padded = block.spec.padded
        self.prefix = prefix

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace the streams and run (or skip) the block with them."""
        streams = self.prefix.streams
        if not streams:
            if self.prefix.goes_on:
                return call(*args, **kwargs)
            raise self.prefix.unfilled()
        if not torch.compiler.is_compiling():
            self._check_rows(streams, args, kwargs)
        if self.padded:
            streams = {k: v[:, : self.arguments.get(k, args, kwargs).shape[1]] for k, v in streams.items()}
        args, kwargs = self.arguments.put(streams, args, kwargs)
        return call(*args, **kwargs)

    def _check_rows(self, streams: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name, captured in streams.items():
            given = self.arguments.get(name, args, kwargs)
            if isinstance(given, Tensor) and given.shape[:1] != captured.shape[:1]:
                raise SkipError(
                    f"block {self.prefix.layer} is resumed with {given.shape[0]} rows of {name}, and "
                    f"{captured.shape[0]} were captured: run the same batch, or take prefix.select(rows, batch)"
                )
