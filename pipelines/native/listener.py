"""Listener: stands at a denoiser's gate, and runs every pass that is a variant of an earlier one from where it differs.

What a call is, it says itself (`NativeKind.read`); that it is a variant of an earlier call is proven (`proof`). The
pipeline is asked only where passes to come will start, so that the plain pass keeps the activations there: if it says
nothing, or is wrong, a pass runs whole, and its place is kept at the next step.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import RLock, get_ident
from typing import Any

import torch
from torch import nn

from skipguide.active import ActivePlan, Call, active_plans, end_everywhere, everywhere_at, hold_everywhere
from skipguide.arguments import batch_size
from skipguide.blocks import find_blocks
from skipguide.errors import SkipError
from skipguide.gate import Installation, gate_of
from skipguide.hosts.compilation import untraced
from skipguide.hosts.diffusers_caches import KNOWN, Reach, cache_on, marked, reach_of
from skipguide.pipelines.native.passes import ReusePasses
from skipguide.pipelines.native.proof import PlainCall, Prover
from skipguide.pipelines.native.stats import ReuseStats, enter_reuse, enter_whole
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
        passes: the forwards that it makes.
        calls: its last plain calls, the newest first.
        waiting: the places from which further passes of this step are expected to start.
        learned: place -> for how many plain calls it has not been asked for, where nobody foretold it.
        failed: place -> how often a pass that would start there was no variant, where nobody foretold it.
        obstacle: why the last plain call kept nothing, if something stood in the way.
    """

    passes: ReusePasses
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
        self.map = find_blocks(self.model)
        self.kinds = tuple(kind for kind in kinds if kind.covers(self.map))
        self.prover = Prover(self.map, [mark for kind in self.kinds for mark in kind.marks])
        self.handle: Any = None  # what the user was given: it can be had back from here
        # modules that come later belong to adapters, and get no hooks
        self._tables = [module.__dict__ for module in self.map.model.modules()]
        self._installation = Installation([gate_of(self.model)])
        self._threads: dict[int, ThreadState] = {}
        self._lock = RLock()  # of the threads' states: another thread may make its own while all are taken away
        self._over = False
        self._untraced = untraced(ReuseListener._handle)

    def install(self) -> None:
        """Put the gates in place."""
        self._over = False
        self._installation.install()
        hold_everywhere(gate_of(self.model), self)
        self._state()

    def remove(self) -> None:
        """Take everything away again."""
        end_everywhere(gate_of(self.model), self)
        with self._lock:
            self._over = True
            while self._threads:
                key = next(iter(self._threads))
                self._threads[key].passes.remove()
                del self._threads[key]
        self._installation.remove()

    def _state(self) -> ThreadState | None:
        """This thread's state, with its gates in place; None where all is over."""
        key = get_ident()
        if (state := self._threads.get(key)) is None:
            with self._lock:
                if self._over:
                    return None
                # first: so that what was not installed can be removed too
                state = self._threads[key] = ThreadState(ReusePasses(self.model, self.stats))
                state.passes.install()
        return state

    # -- one call of the denoiser -------------------------------------------------------------------------------

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the denoiser."""
        return self._untraced(self, call, args, kwargs)

    def _handle(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (state := self._state()) is None:
            return call(*args, **kwargs)
        given = self.prover.given(args, kwargs)
        try:
            hooked = self._hooked()
            kinds = [kind for kind in self.kinds if hooked or not kind.hooked]
            found = [variant for kind in kinds if (variant := kind.read(given, self.map)) is not None]
            if not found:
                return self._plain(state, given, call, args, kwargs)
            if len(found) > 1:
                names = " and ".join(each.kind for each in found)
                left_out = frozenset[int]().union(*(each.left_out for each in found))
                return self._whole(state, names, "both at once", left_out, call, args, kwargs)
            if found[0].sources or (found[0].refusal and not found[0].left_out):
                return self._rows(state, found[0], given, call, args, kwargs)
            return self._variant(state, found[0], given, call, args, kwargs)
        except BaseException:
            state.clear()
            raise

    def _plain(self, state: ThreadState, given: Mapping[str, Any], call: Call, args: Any, kwargs: Any) -> Any:
        """A plain call: what passes to come start from is kept."""
        state.passes.move_in_front(getattr(self.pipe, self.denoiser))
        foretold = {place for kind in self.kinds for place in kind.foretell(self.pipe, self.map)}
        state.learned = {place: age + 1 for place, age in state.learned.items() if age <= PLAIN_CALLS}
        places = sorted(foretold | state.learned.keys())
        state.waiting = set(places)
        state.obstacle = self._obstacle(state) if places else ""
        if not places or state.obstacle:
            state.clear()
            return state.passes.whole(call, args, kwargs)
        made = self.prover.begin(given, batch_size(args, kwargs), places)
        out, made.prefixes = state.passes.keeping(places, call, args, kwargs)
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
        layer = next((n for n in range(variant.start, len(self.map)) if n not in variant.left_out), None)
        why = self._obstacle(state) or variant.refusal
        if not why and layer is None:
            why = "no block runs behind those that are left out"
        if not why and not variant.start and not variant.common:
            why = "it differs from the first block on"
        if why or layer is None:
            return self._whole(state, variant.kind, why, variant.left_out, call, args, kwargs)
        calls = [each for each in state.calls if place in each.prefixes]
        if not calls:
            if not state.obstacle and state.failed[place] < TRIES:
                state.learned[place] = 0
            why = state.obstacle or "its beginning was not kept; it is from the next step on"
            return self._whole(state, variant.kind, why, variant.left_out, call, args, kwargs)
        proven = self.prover.rows(calls, given, batch)
        if isinstance(proven, str):
            if state.learned.pop(place, None) is not None:
                state.failed[place] += 1
            return self._whole(state, variant.kind, proven, variant.left_out, call, args, kwargs)
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
        out = state.passes.resumed(prefix, layer, variant.left_out, call, args, kwargs)
        enter_reuse(self.stats, variant.kind)
        return out

    def _rows(
        self, state: ThreadState, variant: Variant, given: Mapping[str, Any], call: Call, args: Any, kwargs: Any
    ) -> Any:
        """A call some of whose rows are variants of others."""
        why = self._obstacle(state) or variant.refusal
        if not why and not variant.start:
            why = "it differs from the first block on"
        proven = why or self.prover.sources(given, batch_size(args, kwargs), variant.sources)
        if isinstance(proven, str):
            return self._whole(state, variant.kind, proven, variant.left_out, call, args, kwargs)
        out = state.passes.sharing(variant.start, proven, call, args, kwargs)
        enter_reuse(self.stats, variant.kind)
        return out

    def _whole(
        self, state: ThreadState, kind: str, why: str, left_out: frozenset[int], call: Call, args: Any, kwargs: Any
    ) -> Any:
        enter_whole(self.stats, kind, why)
        return state.passes.whole(call, args, kwargs, left_out)

    def _hooked(self) -> bool:
        """Whether any hook of diffusers is in the model; asked at every call, so without a walk through it."""
        return any("_diffusers_hook" in table for table in self._tables)

    def _cache(self) -> str | None:
        """The name of the cache on the denoiser; None without one."""
        if self._hooked():
            return cache_on(self.model, self.pipe)
        return marked(self.model, self.pipe)

    def _beyond(self, state: ThreadState) -> str:
        """Why a pass with the cache on the denoiser has to be whole; empty if it need not.

        A cache that answers for all blocks behind the first does so from what enters and leaves them, and that is the
        same in a pass that starts in the middle. One that counts the calls of sublayers would miss those before it.
        """
        if (cache := self._cache()) is None:
            state.passes.reach = Reach()
            return ""
        blocks = {id(block.module): block.name for block in self.map}
        state.passes.reach = reach = reach_of(self.model, cache, blocks)
        if KNOWN[cache].apart == "contexts" and reach.blocks and not reach.whole:
            return ""
        return f"{cache} is on the denoiser and answers from earlier steps"

    def _obstacle(self, state: ThreadState) -> str:
        """Why nothing can be reused now, whatever the inputs; empty if nothing stands in the way."""
        if torch.is_grad_enabled():
            return "gradients are on"
        if self.map.model.training:
            return "the model is in training mode, and dropout differs from pass to pass"
        if active_plans():
            return "another plan of skipguide is active"
        if why := self._beyond(state):
            return why
        if getattr(getattr(self.map.model, "_parallel_config", None), "context_parallel_config", None):
            return "context parallelism splits the inputs"
        return _COMPILED if state.passes.count.unseen else ""


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
