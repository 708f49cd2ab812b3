"""Acts: what can happen at a gate. Pass through, add nothing, only some rows, capture, inject, values pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from skipguide.blocks import Block, Sublayer, argument_names, takes_any_name, unwrap
from skipguide.errors import SkipError
from skipguide.gate import Act, Call, Frame, active_frames
from skipguide.kv import CACHE_NAMES, hide
from skipguide.resume import Prefix


class Arguments:
    """Reads and replaces a module's arguments by name, however they are passed."""

    __slots__ = ("names", "places")

    def __init__(self, module: nn.Module) -> None:
        self.names = argument_names(unwrap(module))
        self.places = {name: place for place, name in enumerate(self.names)}

    def expect(self, module: nn.Module, name: str, wanted: Sequence[str]) -> None:
        """Refuse a description that reads arguments which `module` has not: in a pass they would be None.

        Raises:
            SkipError: naming them, and what there is.
        """
        unknown = [each for each in wanted if each and each not in self.places]
        if unknown and not takes_any_name(unwrap(module)):
            raise SkipError(
                f"{name} ({type(module).__name__}) is described with the arguments {', '.join(unknown)}, but its "
                f"forward takes {', '.join(self.names)}: name them in its BlockSpec (streams) or Sublayer (outputs)"
            )

    def get(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of argument `name` (of the first one, if `name` is empty), or None."""
        if not name:
            return first_tensor(args, kwargs)
        if name in kwargs:
            return kwargs[name]
        place = self.places.get(name, len(args))
        return args[place] if place < len(args) else None

    def cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The KV cache that is given, by whichever name, or None."""
        for name in CACHE_NAMES:
            if (found := self.get(name, args, kwargs)) is not None:
                return found
        return None

    def put(
        self, values: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with some arguments replaced."""
        new_args = tuple(values.get(name, value) for name, value in zip(self.names, args, strict=False))
        return new_args + args[len(new_args) :], kwargs | {k: v for k, v in values.items() if k in kwargs}

    def rows(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        index: Tensor | slice,
        size: int,
        shared: tuple[str, ...],
        listed: tuple[str, ...] = (),
        folded: tuple[str, ...] = (),
        batch: int = 0,
        layered: tuple[str, ...] = (),
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call for some batch rows.

        Arguments named in `shared` have no batch dimension; those in `listed` are lists with an entry per row; those
        in `folded` fold something else into the model's `batch` (0 is `size`) than the first argument does; those in
        `layered` have the batch as their second dimension.
        """

        def some(name: str, value: Any) -> Any:
            if name in shared:
                return value
            if name in listed and isinstance(value, (list, tuple)):
                return value[index] if isinstance(index, slice) else [value[i] for i in index.tolist()]
            if name in folded and isinstance(value, Tensor):
                return _refold(value, index, size, batch or size)
            if name in layered and isinstance(value, Tensor):
                return value[:, index]
            return take_rows(value, index, size)

        names = (*self.names, *[""] * len(args))
        new_args = tuple(some(name, value) for name, value in zip(names, args, strict=False))
        return new_args, {name: some(name, value) for name, value in kwargs.items()}


class PassThrough:
    """The block's output is its input streams, the first through its shortcut where it has one: no branch runs."""

    __slots__ = ("adds", "arguments", "counted", "name", "nothings", "returns", "shortcut")

    def __init__(self, block: Block, counted: bool = True) -> None:
        self.arguments = Arguments(block.module)
        self.returns = block.spec.returns or block.spec.streams
        self.adds = block.spec.adds
        self.arguments.expect(block.module, block.name, (*self.returns, *self.adds))
        self.nothings = (None,) * block.spec.nothings
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
        streams += self.nothings
        if self.adds:
            streams = (*(torch.zeros_like(self.arguments.get(name, args, kwargs)) for name in self.adds), *streams)
        return streams if len(streams) > 1 else streams[0]


class AddNothing:
    """The sublayer's residual contribution is zero, and it does not run."""

    __slots__ = ("arguments", "inside", "name", "nothings", "outputs", "width")

    def __init__(self, name: str, module: nn.Module, sublayer: Sublayer) -> None:
        self.arguments = Arguments(module)
        self.outputs = sublayer.outputs
        self.nothings = (None,) * sublayer.nothings
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
        out = (*made, *self.nothings)
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
        if (cache := self.arguments.cache(args, kwargs)) is not None:
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


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first argument of a call that is a tensor with a batch dimension."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim():
            return value
    raise SkipError("a module was called without a tensor: its batch size is unknown")


def row_index(rows: Sequence[int], batch: int, like: Tensor) -> Tensor:
    """Index of model batch rows in a tensor whose first dimension folds more into the batch (frames, positions)."""
    fold, rest = divmod(like.shape[0], batch)
    if rest:
        raise SkipError(f"a block's batch of {like.shape[0]} is not a multiple of the model's batch of {batch}")
    index = torch.tensor(rows, device=like.device)
    if fold > 1:
        index = (index[:, None] * fold + torch.arange(fold, device=like.device)).flatten()
    return index


def _refold(value: Tensor, index: Tensor | slice, size: int, batch: int) -> Tensor:
    """The rows of a tensor for an index into `size` rows, both of which fold something into the same `batch`."""
    own, fold = size // batch, value.shape[0] // batch
    if isinstance(index, slice):
        start, stop, _ = index.indices(size)
        return value[start // own * fold : stop // own * fold]
    return value[row_index((index[::own] // own).tolist(), batch, value)]


def take_rows(value: Any, index: Tensor | slice, size: int) -> Any:
    """The rows of every tensor in `value` whose first dimension is the batch; everything else as it is."""
    if isinstance(value, Tensor):
        return value[index] if value.dim() and value.shape[0] == size else value
    if isinstance(value, (tuple, list)):
        return type(value)(take_rows(item, index, size) for item in value)
    if isinstance(value, dict):
        return {key: take_rows(item, index, size) for key, item in value.items()}
    return value


def _merge(kept: Any, left: Any, keep: Tensor, skip: Tensor, size: int) -> Any:
    if isinstance(kept, Tensor):
        out = kept.new_empty((size, *kept.shape[1:]))
        out[keep] = kept
        out[skip] = left.to(kept.dtype)
        return out
    if isinstance(kept, (tuple, list)):
        return type(kept)(_merge(a, b, keep, skip, size) for a, b in zip(kept, left, strict=True))
    return kept
