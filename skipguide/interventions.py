"""Acts: what can happen at a gate. Pass through, add nothing, only some rows, capture, inject, values pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from skipguide.active import Act, Call, Frame, active_frames
from skipguide.arguments import Arguments, first_tensor, row_index, sequence_like, take_rows
from skipguide.blocks import Block
from skipguide.errors import SkipError
from skipguide.hosts.kv_cache import given_cache, hide
from skipguide.prefix import Prefix
from skipguide.spec import Sublayer


class PassThrough:
    """The block's output is its input streams, the first through its shortcut where it has one: no branch runs."""

    __slots__ = ("adds", "arguments", "counted", "name", "none_outputs", "returns", "shortcut")

    def __init__(self, block: Block, counted: bool = True) -> None:
        self.arguments = Arguments(block.module)
        self.returns = block.spec.returns or block.spec.streams
        self.adds = block.spec.adds
        self.arguments.expect(block.module, block.name, (*self.returns, *self.adds))
        self.none_outputs = (None,) * block.spec.none_outputs
        self.shortcut = block.shortcut
        self.name = block.name
        self.counted = counted

    def __call__(self, frame: Frame, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the streams in the block's output order."""
        if self.counted and not torch.compiler.is_compiling():
            frame.stats.skipped(self.name, frame.present)
        streams = tuple(self.arguments.get(name, args, kwargs) for name in self.returns)
        if self.shortcut is not None:
            streams = (self.shortcut(streams[0]), *streams[1:])
        streams += self.none_outputs
        if self.adds:
            streams = (*(torch.zeros_like(self.arguments.get(name, args, kwargs)) for name in self.adds), *streams)
        return streams if len(streams) > 1 else streams[0]


class AddNothing:
    """The sublayer's residual contribution is zero, and it does not run."""

    __slots__ = ("arguments", "inside", "name", "none_outputs", "outputs", "width")

    def __init__(self, name: str, module: nn.Module, sublayer: Sublayer) -> None:
        self.arguments = Arguments(module)
        self.outputs = sublayer.outputs
        self.none_outputs = (None,) * sublayer.none_outputs
        self.inside = sublayer.inside
        self.width: int | None = getattr(module, sublayer.width) if sublayer.width else None
        if self.width is None:
            self.arguments.expect(module, name, self.outputs)
        self.name = name

    def __call__(self, frame: Frame, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return zeros shaped like the sublayer's outputs (or the residual, where the sublayer would have added it)."""
        if not torch.compiler.is_compiling():
            frame.stats.skipped(self.name, frame.present)
        if self.width is not None:
            like = first_tensor(args, kwargs)
            return like.new_zeros((*like.shape[:-1], self.width))
        given = [self.arguments.get(name, args, kwargs) for name in self.outputs]
        made = [value if self.inside else torch.zeros_like(value) for value in given if value is not None]
        out = (*made, *self.none_outputs)
        return out if len(out) > 1 else out[0]


class WithoutKeys:
    """Another act that leaves attention out: the layer of the KV cache that this attention would fill is taken out."""

    __slots__ = ("act", "arguments", "index", "layers", "refusal")

    def __init__(self, act: Act, module: nn.Module, index: int, layers: int, refusal: str = "") -> None:
        self.act = act
        self.arguments = Arguments(module)
        self.index = index
        self.layers = layers
        self.refusal = refusal  # why a cache cannot be used, if it cannot

    def __call__(self, frame: Frame, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Skip, and take the keys out; the masks of the running pass are made already."""
        if (cache := given_cache(self.arguments, args, kwargs)) is not None:
            if self.refusal:
                raise SkipError(f"{self.refusal}, and this pass has a KV cache: pass use_cache=False")
            hide(cache, (self.index,), self.layers)
        return self.act(frame, call, args, kwargs)


class PassOn:
    """A module that only works for a sublayer that is left out returns what it is given."""

    __slots__ = ()

    def __call__(self, frame: Frame, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the first argument."""
        return args[0] if args else next(iter(kwargs.values()))


class OnRows:
    """Another act for some batch rows; the module really runs on the other rows only."""

    __slots__ = ("act", "arguments", "folded", "rows", "shared")

    def __init__(self, act: Act, rows: Sequence[int], block: Block, module: nn.Module) -> None:
        self.act = act
        self.arguments = Arguments(module)
        self.rows = tuple(rows)
        self.shared = block.spec.shared
        self.folded = block.spec.folded if module is block.module else ()

    def __call__(self, frame: Frame, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Split the batch, run each part as it should, and put the rows back in order."""
        batch = frame.batch
        asked = {row + batch if row < 0 else row for row in self.rows}
        if not asked <= set(range(batch)):
            raise SkipError(f"rows {self.rows} are out of range for a batch of {batch}")
        present = tuple(range(batch)) if frame.rows is None else frame.rows
        left = tuple(row for row in present if row in asked)
        kept = tuple(row for row in present if row not in asked)
        if not left:
            return call(*args, **kwargs)
        if not kept:
            return self.act(frame, call, args, kwargs)
        first = first_tensor(args, kwargs)
        keep = row_index([present.index(row) for row in kept], len(present), first)
        skip = row_index([present.index(row) for row in left], len(present), first)
        mine = [
            self.arguments.rows(args, kwargs, index, first.shape[0], self.shared, (), self.folded, len(present))
            for index in (keep, skip)
        ]
        frames = [other for other in active_frames() if other.rows == frame.rows]
        before = frame.rows
        try:
            for other in frames:
                other.rows = kept
            ran = call(*mine[0][0], **mine[0][1])
            for other in frames:
                other.rows = left
            rest = self.act(frame, call, *mine[1])
        finally:
            for other in frames:
                other.rows = before
        return _merge(ran, rest, keep, skip, first.shape[0])


class ForOthers:
    """Runs a block for some batch rows; every other row gets what one of them got."""

    __slots__ = ("arguments", "folded", "own", "places", "shared")

    def __init__(self, block: Block, sources: Sequence[int]) -> None:
        """Sources: for each row of the batch the row whose result it has; a row that runs is its own."""
        self.arguments = Arguments(block.module)
        self.own = tuple(row for row, source in enumerate(sources) if row == source)
        self.places = tuple(self.own.index(source) for source in sources)
        self.shared = block.spec.shared
        self.folded = block.spec.folded

    def __call__(self, frame: Frame, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take the rows out, run the block, and hand out its results."""
        if frame.batch != len(self.places):
            raise SkipError(f"rows were shared for a batch of {len(self.places)}; got a batch of {frame.batch}")
        if frame.rows is not None:  # another plan took rows out already: all that are left run
            return call(*args, **kwargs)
        like = first_tensor(args, kwargs)
        size, fold = like.shape[0], like.shape[0] // frame.batch
        ordered = self.own == tuple(range(len(self.own)))
        index = slice(0, len(self.own) * fold) if ordered else row_index(self.own, frame.batch, like)
        frames = [other for other in active_frames() if other.rows is None]
        try:
            for other in frames:
                other.rows = self.own
            args, kwargs = self.arguments.rows(args, kwargs, index, size, self.shared, (), self.folded, frame.batch)
            out = call(*args, **kwargs)
        finally:
            for other in frames:
                other.rows = None
        return take_rows(out, row_index(self.places, frame.batch, like), len(self.own) * fold)


class Capture:
    """Keeps the streams that enter a block, and runs it."""

    __slots__ = ("arguments", "prefix", "streams")

    def __init__(self, block: Block, prefix: Prefix) -> None:
        self.arguments = Arguments(block.module)
        self.streams = block.spec.streams
        self.prefix = prefix

    def __call__(self, frame: Frame, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Store references, no copies: blocks do not write into their inputs."""
        # a new dict, so that a compiled pass does not depend on what the old one held
        self.prefix.streams = {name: self.arguments.get(name, args, kwargs) for name in self.streams}
        return call(*args, **kwargs)


class Keep:
    """Runs a block and keeps what it returns, which the model reads again later."""

    __slots__ = ("name", "prefix")

    def __init__(self, block: Block, prefix: Prefix) -> None:
        self.name = block.name
        self.prefix = prefix

    def __call__(self, frame: Frame, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Store a reference to the output."""
        out = self.prefix.kept[self.name] = call(*args, **kwargs)
        return out


class Replay:
    """In place of a block that does not run: what it returned when it did."""

    __slots__ = ("arguments", "name", "prefix", "stream")

    def __init__(self, block: Block, prefix: Prefix) -> None:
        self.arguments = Arguments(block.module)
        self.name = block.name
        self.prefix = prefix
        self.stream = block.spec.streams[0] if block.spec.padded else None

    def __call__(self, frame: Frame, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what was kept."""
        out = self.prefix.kept[self.name]
        return out if self.stream is None else out[:, : self.arguments.get(self.stream, args, kwargs).shape[1]]


class Inject:
    """Gives a block the streams that were captured, whatever came in."""

    __slots__ = ("arguments", "padded", "prefix")

    def __init__(self, block: Block, prefix: Prefix) -> None:
        self.arguments = Arguments(block.module)
        self.padded = block.spec.padded
        self.prefix = prefix

    def __call__(self, frame: Frame, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace the streams and run (or skip) the block with them."""
        streams = self.prefix.streams
        if not streams:
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


def _merge(kept: Any, left: Any, keep: Tensor, skip: Tensor, size: int) -> Any:
    if isinstance(kept, Tensor):
        out = kept.new_empty((size, *kept.shape[1:]))
        out[keep] = kept
        out[skip] = left.to(kept.dtype)
        return out
    if isinstance(kept, (tuple, list)):
        return sequence_like(kept, (_merge(a, b, keep, skip, size) for a, b in zip(kept, left, strict=True)))
    return kept
