"""Listener: stands at a denoiser's gate, and runs every pass that is a variant of an earlier one from where it differs.

What a call is, it says itself (`NativeKind.read`); that it is a variant of an earlier call is proven (`proof`). The
pipeline is asked only where passes to come will start, so that the plain pass keeps the activations there: if it says
nothing, or is wrong, a pass runs whole, and its place is kept at the next step.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import nn

from skipguide.active import ActivePlan, Call, active_plans, end_everywhere, everywhere_at, hold_everywhere
from skipguide.arguments import batch_size
from skipguide.errors import SkipError
from skipguide.gate import gate_of
from skipguide.hosts.compilation import untraced
from skipguide.hosts.diffusers_caches import cache_on
from skipguide.pipelines.native.passes import ReusePasses
from skipguide.pipelines.native.proof import PlainCall, Prover
from skipguide.pipelines.native.stats import ReuseStats
from skipguide.pipelines.native.variants import NativeKind, Place, Variant

TRIES = 3  # how often a place is kept that nobody foretold, for passes that turn out to be no variants
PLAIN_CALLS = 2  # conditional and unconditional in calls of their own
_COMPILED = (
    "the blocks run inside one compiled graph, where nobody sees them: compile them one by one "
    "(model.compile_repeated_blocks())"
)


@dataclass
class ThreadState:
    """What is kept of one thread's calls.

    Attributes:
        calls: its last plain calls, the newest first.
        waiting: the places from which further passes of this step are expected to start.
        learned: place -> for how many plain calls it has not been asked for, where nobody foretold it.
        failed: place -> how often a pass that would start there was no variant, where nobody foretold it.
        obstacle: why the last plain call kept nothing, if something stood in the way.
    """

    calls: deque[PlainCall] = field(default_factory=lambda: deque(maxlen=PLAIN_CALLS))
    waiting: set[Place] = field(default_factory=set)
    learned: dict[Place, int] = field(default_factory=dict)
    failed: Counter[Place] = field(default_factory=Counter)
    obstacle: str = ""

    def clear(self) -> None:
        """Let go of the activations."""
        self.calls.clear()
        self.waiting.clear()


class ReuseListener:
    """Prefix reuse at one denoiser of one pipeline.

    Args:
        pipe: the pipeline.
        denoiser: which of its attributes.
        kinds: the kinds of passes that are looked for.
        stats: the ledger.
    """

    def __init__(self, pipe: Any, denoiser: str, kinds: Sequence[NativeKind], stats: ReuseStats) -> None:
        self.pipe = pipe
        self.denoiser = denoiser
        self.model: nn.Module = getattr(pipe, denoiser)
        self.stats = stats
        self.passes = ReusePasses(self.model, stats)
        self.kinds = tuple(kind for kind in kinds if kind.covers(self.passes.map))
        self.prover = Prover(self.passes.map, [mark for kind in self.kinds for mark in kind.marks])
        self.handle: Any = None  # what the user was given: it can be had back from here
        self._threads: dict[int, ThreadState] = {}
        self._untraced = untraced(ReuseListener._handle)

    def install(self) -> None:
        """Put the gates in place."""
        self.passes.install()
        hold_everywhere(gate_of(self.model), self)

    def remove(self) -> None:
        """Take everything away again."""
        end_everywhere(gate_of(self.model), self)
        self._threads.clear()
        self.passes.remove()

    # -- one call of the denoiser -------------------------------------------------------------------------------

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the denoiser."""
        return self._untraced(self, call, args, kwargs)

    def _handle(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = self._threads.setdefault(get_ident(), ThreadState())
        given = self.prover.given(args, kwargs)
        try:
            found = [variant for kind in self.kinds if (variant := kind.read(given, self.passes.map)) is not None]
            if not found:
                return self._plain(state, given, call, args, kwargs)
            if len(found) > 1:
                kinds = " and ".join(each.kind for each in found)
                left_out = frozenset[int]().union(*(each.left_out for each in found))
                return self._whole(kinds, "both at once", left_out, call, args, kwargs)
            if found[0].sources or (found[0].refusal and not found[0].left_out):
                return self._rows(found[0], given, call, args, kwargs)
            return self._variant(state, found[0], given, call, args, kwargs)
        except BaseException:
            state.clear()
            raise

    def _plain(self, state: ThreadState, given: Mapping[str, Any], call: Call, args: Any, kwargs: Any) -> Any:
        """A plain call: what passes to come start from is kept."""
        self.passes.move_in_front(getattr(self.pipe, self.denoiser))
        foretold = {place for kind in self.kinds for place in kind.foretell(self.pipe, self.passes.map)}
        state.learned = {place: age + 1 for place, age in state.learned.items() if age <= PLAIN_CALLS}
        places = sorted(foretold | state.learned.keys())
        state.waiting = set(places)
        state.obstacle = self._obstacle() if places else ""
        if not places or state.obstacle:
            state.clear()
            return self.passes.whole(call, args, kwargs)
        made = self.prover.begin(given, batch_size(args, kwargs), places)
        out, made.prefixes = self.passes.keeping(places, call, args, kwargs)
        if not made.prefixes:
            state.obstacle = "something answers in place of the denoiser's blocks"
            state.clear()
            return out
        state.calls.appendleft(made)
        return out

    def _variant(
        self, state: ThreadState, variant: Variant, given: Mapping[str, Any], call: Call, args: Any, kwargs: Any
    ) -> Any:
        """A call that is a variant of an earlier one, if that can be proven."""
        place, batch = variant.place, batch_size(args, kwargs)
        layer = next((n for n in range(variant.start, len(self.passes.map)) if n not in variant.left_out), None)
        why = self._obstacle() or variant.refusal
        if not why and layer is None:
            why = "no block runs behind those that are left out"
        if not why and not variant.start and not variant.common:
            why = "it differs from the first block on"
        if why or layer is None:
            return self._whole(variant.kind, why, variant.left_out, call, args, kwargs)
        calls = [each for each in state.calls if place in each.prefixes]
        if not calls:
            if not state.obstacle and state.failed[place] < TRIES:
                state.learned[place] = 0
            why = state.obstacle or "its beginning was not kept; it is from the next step on"
            return self._whole(variant.kind, why, variant.left_out, call, args, kwargs)
        proven = self.prover.rows(calls, given, batch)
        if isinstance(proven, str):
            if state.learned.pop(place, None) is not None:
                state.failed[place] += 1
            return self._whole(variant.kind, proven, variant.left_out, call, args, kwargs)
        if place in state.learned:
            state.learned[place] = 0
        source, rows = proven
        prefix = source.prefixes[place].select(rows, source.batch)
        state.waiting.discard(place)
        for each in state.calls:
            each.prefixes.pop(place, None)
        if not state.waiting:
            state.clear()
        del source, calls, proven
        out = self.passes.resumed(prefix, layer, variant.left_out, call, args, kwargs)
        self.stats.reused[variant.kind] += 1
        return out

    def _rows(self, variant: Variant, given: Mapping[str, Any], call: Call, args: Any, kwargs: Any) -> Any:
        """A call some of whose rows are variants of others."""
        why = self._obstacle() or variant.refusal
        if not why and not variant.start:
            why = "it differs from the first block on"
        proven = why or self.prover.sources(given, batch_size(args, kwargs), variant.sources)
        if isinstance(proven, str):
            return self._whole(variant.kind, proven, variant.left_out, call, args, kwargs)
        out = self.passes.sharing(variant.start, proven, call, args, kwargs)
        self.stats.reused[variant.kind] += 1
        return out

    def _whole(self, kind: str, why: str, left_out: frozenset[int], call: Call, args: Any, kwargs: Any) -> Any:
        self.stats.not_reused[f"{kind} whole: {why}"] += 1
        return self.passes.whole(call, args, kwargs, left_out)

    def _obstacle(self) -> str:
        """Why nothing can be reused now, whatever the inputs; empty if nothing stands in the way."""
        if torch.is_grad_enabled():
            return "gradients are on"
        if self.passes.map.model.training:
            return "the model is in training mode, and dropout differs from pass to pass"
        if active_plans():
            return "another plan of skipguide is active"
        if (cache := cache_on(self.model, self.pipe)) is not None:
            return f"{cache} is on the denoiser and answers from earlier steps"
        if getattr(getattr(self.passes.map.model, "_parallel_config", None), "context_parallel_config", None):
            return "context parallelism splits the inputs"
        return _COMPILED if self.passes.count.unseen else ""


def refuse_native_reuse(model: nn.Module, what: str) -> None:
    """Refuse what makes passes of its own where prefix reuse is applied.

    Raises:
        SkipError: if it is.
    """
    if everywhere_at(gate_of(model), ReuseListener):
        raise SkipError(
            f"PrefixReuse is applied to this denoiser, and {what} makes and shares passes of its own: call remove() on "
            f"one of them first (skipguide.applied_to(pipe) finds it)"
        )
