"""Interventions: what can happen at a gate. Skip a block, zero a branch, return the input; on rows, or at times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from skipguide.active import ActivePlan, Call, Intervention, active_plans
from skipguide.arguments import Arguments, first_tensor, row_index, sequence_like, take_rows
from skipguide.blocks import Block
from skipguide.errors import SkipError
from skipguide.hosts.kv_cache import given_cache, hide
from skipguide.spec import Sublayer


class SkipBlock:
    """The block's output is its input streams, the first through its shortcut where it has one: no branch runs."""

    __slots__ = ("adds", "arguments", "counted", "name", "none_outputs", "returns", "shortcut")

    def __init__(self, block: Block, counted: int = 1) -> None:
        """Read the block's description.

        Args:
            block: the block.
            counted: for how many left-out modules of the plan it stands; 0 enters nothing in the ledger.
        """
        self.arguments = Arguments(block.module)
        self.returns = block.spec.returns or block.spec.streams
        self.adds = block.spec.adds
        self.arguments.expect(block.module, block.name, (*self.returns, *self.adds))
        self.none_outputs = (None,) * block.spec.none_outputs
        self.shortcut = block.shortcut
        self.name = block.name
        self.counted = counted

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the streams in the block's output order."""
        if self.counted and not torch.compiler.is_compiling():
            plan.skipped(self.name, self.counted)
        streams = tuple([self.arguments.get(name, args, kwargs) for name in self.returns])
        if self.shortcut is not None:
            streams = (self.shortcut(streams[0]), *streams[1:])
        streams += self.none_outputs
        if self.adds:
            streams = (*(torch.zeros_like(self.arguments.get(name, args, kwargs)) for name in self.adds), *streams)
        return streams if len(streams) > 1 else streams[0]


class ZeroBranch:
    """The sublayer's residual contribution is zero, and it does not run.

    Args:
        name: of the sublayer in the ledger.
        module: the sublayer.
        sublayer: its description.
        spread: return one zero that is spread out over the shape, with nothing to fill and nothing to read: for models
            that do not write into what a sublayer returns.
    """

    __slots__ = ("arguments", "inside", "name", "none_outputs", "outputs", "spread", "width", "zeros")

    def __init__(self, name: str, module: nn.Module, sublayer: Sublayer, spread: bool = False) -> None:
        self.arguments = Arguments(module)
        self.outputs = sublayer.outputs
        self.none_outputs = (None,) * sublayer.none_outputs
        self.inside = sublayer.inside
        self.width: int | None = getattr(module, sublayer.width) if sublayer.width else None
        if self.width is None:
            self.arguments.expect(module, name, self.outputs)
        self.name = name
        self.spread = spread
        self.zeros: dict[Any, Tensor] = {}

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return zeros shaped like the sublayer's outputs (or the residual, where the sublayer would have added it)."""
        if not torch.compiler.is_compiling():
            plan.skipped(self.name)
        if self.width is not None:
            return self._wide(first_tensor(args, kwargs), self.width)
        if self.spread and len(self.outputs) == 1:  # runs once per layer and decoded token: kept short
            name = self.outputs[0]
            given = args[0] if args and not name else self.arguments.get(name, args, kwargs)
            zero = given if self.inside else self._zero(given).expand(given.shape)
            return (zero, *self.none_outputs) if self.none_outputs else zero
        given = [self.arguments.get(name, args, kwargs) for name in self.outputs]
        made = [value if self.inside else torch.zeros_like(value) for value in given if value is not None]
        out = (*made, *self.none_outputs)
        return out if len(out) > 1 else out[0]

    def _wide(self, like: Tensor, width: int) -> Any:
        """Zeros of another width than the input's."""
        shape = (*like.shape[:-1], width)
        out = self._zero(like).expand(shape) if self.spread else like.new_zeros(shape)
        return (out, *self.none_outputs) if self.none_outputs else out

    def _zero(self, like: Tensor) -> Tensor:
        """One zero, made once per dtype and device."""
        if torch.compiler.is_compiling():
            return like.new_zeros(())
        # a tensor made in inference mode is not for autograd
        key = (like.dtype, like.device, torch.is_inference_mode_enabled())
        if (zero := self.zeros.get(key)) is None:
            zero = self.zeros[key] = like.new_zeros(())
        return zero


class LeaveOutKeys:
    """Attention is left out, and with it the layer of the KV cache that it would fill."""

    __slots__ = ("arguments", "index", "intervention", "layers", "refusal")

    def __init__(
        self, intervention: Intervention, module: nn.Module, index: int, layers: int, refusal: str = ""
    ) -> None:
        self.intervention = intervention
        self.arguments = Arguments(module)
        self.index = index
        self.layers = layers
        self.refusal = refusal  # why a cache cannot be used, if it cannot

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Skip, and take the keys out; the masks of the running pass are made already."""
        if (cache := given_cache(self.arguments, args, kwargs)) is not None:
            if self.refusal:
                raise SkipError(f"{self.refusal}, and this pass has a KV cache: pass use_cache=False")
            hide(cache, (self.index,), self.layers)
        return self.intervention(plan, call, args, kwargs)


class ReturnInput:
    """A module that only works for a sublayer that is left out returns what it is given."""

    __slots__ = ()

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the first argument."""
        return args[0] if args else next(iter(kwargs.values()))


class OnRows:
    """Another intervention for some batch rows; the module really runs on the other rows only."""

    __slots__ = ("arguments", "folded", "followed", "intervention", "rows", "shared")

    def __init__(self, intervention: Intervention, rows: Sequence[int], block: Block, module: nn.Module) -> None:
        self.intervention = intervention
        self.arguments = Arguments(module)
        self.rows = tuple(rows)
        self.shared = block.spec.shared
        self.folded, self.followed = (block.spec.folded, block.spec.followed) if module is block.module else ((), ())

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Split the batch, run each part as it should, and put the rows back in order."""
        batch = plan.batch
        asked = {row + batch if row < 0 else row for row in self.rows}
        if not asked <= set(range(batch)):
            raise SkipError(f"rows {self.rows} are out of range for a batch of {batch}")
        present = tuple(range(batch)) if plan.rows is None else plan.rows
        left = tuple(row for row in present if row in asked)
        kept = tuple(row for row in present if row not in asked)
        if not left:
            return call(*args, **kwargs)
        if not kept:
            return self.intervention(plan, call, args, kwargs)
        first = first_tensor(args, kwargs)
        keep = row_index([present.index(row) for row in kept], len(present), first)
        skip = row_index([present.index(row) for row in left], len(present), first)
        kinds = (self.shared, (), self.folded, len(present), (), self.followed)
        mine = [self.arguments.rows(args, kwargs, index, first.shape[0], *kinds) for index in (keep, skip)]
        others = [other for other in active_plans() if other.rows == plan.rows]
        before = plan.rows
        try:
            for other in others:
                other.rows = kept
            ran = call(*mine[0][0], **mine[0][1])
            for other in others:
                other.rows = left
            rest = self.intervention(plan, call, *mine[1])
        finally:
            for other in others:
                other.rows = before
        return _merge(ran, rest, keep, skip, first.shape[0])


class ShareRows:
    """Runs a block for some batch rows; every other row gets what one of them got."""

    __slots__ = ("arguments", "folded", "followed", "own", "places", "shared")

    def __init__(self, block: Block, sources: Sequence[int]) -> None:
        """Read the rows.

        Args:
            block: the block.
            sources: for each row of the batch the row whose result it has; a row that runs is its own.
        """
        self.arguments = Arguments(block.module)
        self.own = tuple(row for row, source in enumerate(sources) if row == source)
        self.places = tuple(self.own.index(source) for source in sources)
        self.shared = block.spec.shared
        self.folded, self.followed = block.spec.folded, block.spec.followed

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take the rows out, run the block, and hand out its results."""
        if plan.batch != len(self.places):
            raise SkipError(f"rows were shared for a batch of {len(self.places)}; got a batch of {plan.batch}")
        if plan.rows is not None:  # another plan took rows out already: all that are left run
            return call(*args, **kwargs)
        like = first_tensor(args, kwargs)
        size, fold = like.shape[0], like.shape[0] // plan.batch
        ordered = self.own == tuple(range(len(self.own)))
        index = slice(0, len(self.own) * fold) if ordered else row_index(self.own, plan.batch, like)
        others = [other for other in active_plans() if other.rows is None]
        try:
            for other in others:
                other.rows = self.own
            kinds = (self.shared, (), self.folded, plan.batch, (), self.followed)
            args, kwargs = self.arguments.rows(args, kwargs, index, size, *kinds)
            out = call(*args, **kwargs)
        finally:
            for other in others:
                other.rows = None
        return take_rows(out, row_index(self.places, plan.batch, like), len(self.own) * fold)


class When:
    """Another intervention, in passes that meet a condition: steps in a window, a phase, an extension of a plan.

    Args:
        condition: its name in the plan's `holds`, which says for every pass whether it is met.
        intervention: what happens then; otherwise the module runs.
        unknown: the error where `holds` does not say whether it is met; empty: then it is not.
    """

    __slots__ = ("condition", "intervention", "unknown")

    def __init__(self, condition: str, intervention: Intervention, unknown: str = "") -> None:
        self.condition = condition
        self.intervention = intervention
        self.unknown = unknown

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Intervene, or run the module."""
        met = plan.holds.get(self.condition)
        if met:
            return self.intervention(plan, call, args, kwargs)
        if met is None and self.unknown:
            raise SkipError(self.unknown)
        return call(*args, **kwargs)


class Nested:
    """Two interventions at one module, the first around the second."""

    __slots__ = ("inner", "outer")

    def __init__(self, outer: Intervention, inner: Intervention) -> None:
        self.outer = outer
        self.inner = inner

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run both."""

        def inner(*a: Any, **k: Any) -> Any:
            return self.inner(plan, call, a, k)

        return self.outer(plan, inner, args, kwargs)


def _merge(kept: Any, left: Any, keep: Tensor, skip: Tensor, size: int) -> Any:
    if isinstance(kept, Tensor):
        out = kept.new_empty((size, *kept.shape[1:]))
        out[keep] = kept
        out[skip] = left.to(kept.dtype)
        return out
    if isinstance(kept, (tuple, list)):
        return sequence_like(kept, (_merge(a, b, keep, skip, size) for a, b in zip(kept, left, strict=True)))
    return kept
