"""Decoder pass: what the running pass of a language model leaves out, and the cache that it runs on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from skipguide.active import ActivePlan
from skipguide.errors import SkipError
from skipguide.hosts.kv_cache import check_kind, empty, hide, length
from skipguide.llm import cache as kv
from skipguide.llm.interventions import ATTN, BOTH, MLP, extended_layer, extended_mlp
from skipguide.llm.ledger import SublayerLedger
from skipguide.llm.passes import Pass, PassReader, decodes
from skipguide.llm.plan_data import SublayerPlanData
from skipguide.llm.sublayers import SublayerMap
from skipguide.model_pass import ModelPass
from skipguide.stats import Stats

Listener = Callable[[Pass], Callable[[], None] | None]
_NO_EXTENSION: dict[int, float | None] = {}


class PlanState:
    """What an applied plan knows at run time. It holds no modules: an active plan may outlive the model.

    Attributes:
        enabled: whether the plan holds (drafting goes before it).
        drafting: how many `drafting` blocks are open.
        last: the mark of the cache of the last pass.
        lost: raises if a gate was replaced.
        extend: installs the interventions that leave out more feed-forwards than the plan names.
        listeners: those that are called before a pass.
        uncached: passes without a cache.
        whole: the empty plan that this one has replaced, if any: caches filled under it go on under this one.
    """

    def __init__(
        self,
        plan: SublayerPlanData,
        sublayers: SublayerMap,
        cached: bool,
        lost: Callable[[], None],
        extend: Callable[[Iterable[int]], None],
        listeners: Callable[[], Sequence[Listener] | None],
    ) -> None:
        self.plan = plan
        self.cached = cached
        self.layers = sublayers.num_layers
        self.hide = tuple(sublayers.site(i, "attn").cache_index for i in plan.attn)
        self.enabled = True
        self.drafting = 0
        self.last: kv.Mark | None = None
        self.listeners = listeners
        self.stats = Stats()
        self.ledger = SublayerLedger(tuple(site.name for site in sublayers.sites), self.stats)
        self.lost = lost
        self.extend = extend
        self.uncached = 0
        self.whole: SublayerPlanData | None = None
        self._names = {(site.layer, site.part): site.name for site in sublayers.sites}
        self._left_out: dict[tuple[bool, bool, tuple[int, ...]], tuple[str, ...]] = {}

    def left_out(self, attn: bool, mlp: bool, extra: Iterable[int]) -> tuple[str, ...]:
        """The names of what a pass leaves out, the same tuple for the same passes."""
        key = (attn, mlp, tuple(extra))
        if (found := self._left_out.get(key)) is None:
            keys: list[Any] = [(i, "attn") for i in self.plan.attn if attn]
            keys += [(i, "mlp") for i in (*(i for i in self.plan.mlp if mlp), *extra)]
            found = self._left_out[key] = tuple(self._names[each] for each in keys)
        return found

    # -- the cache ----------------------------------------------------------------------------------------------

    def mark(self, cache: Any, made: bool = False) -> kv.Mark:
        """The mark of a cache; a new one if it fits to this plan.

        Args:
            cache: the cache of the running pass.
            made: the model has made it in this pass.
        """
        plan, mark = self.plan, kv.mark_of(cache)
        if mark is not None:
            if mark.plan is plan or mark.plan == plan:
                return mark
            if mark.plan is not self.whole:
                raise SkipError(
                    f"this KV cache was made under another plan ({mark.plan}) than the one that is applied ({plan}): "
                    f"start a new sequence, or go on under the plan that it was made under"
                )
            mark = kv.Mark(
                plan, filled=mark.filled, decoded=mark.decoded
            )  # full of the whole model, and goes on under the plan
            kv.set_mark(cache, mark)
            return mark
        check_kind(cache)
        if not self.cached:
            raise SkipError(
                "the plan was applied with cached=False, but this pass has a KV cache: pass use_cache=False"
            )
        held = 0 if made else length(cache)
        if held and plan.phase != "decode":
            raise SkipError(
                f"this KV cache holds {held} tokens of the whole model, and the plan leaves sublayers out from the "
                f"first token on: start a new sequence, or use phase='decode'"
            )
        mark = kv.Mark(plan, filled=held > 0)
        kv.set_mark(cache, mark)
        return mark

    def restart(self, mark: kv.Mark) -> None:
        """A cache that was reset starts another sequence."""
        if mark.hidden and self.plan.attn and self.plan.phase == "decode":
            raise SkipError(
                "this KV cache was reset, but the layers of left-out attention are gone from it, and phase='decode' "
                "reads the prompt with the whole model: use a new cache"
            )
        mark.filled = mark.decoded = False
        mark.extra.clear()

    def decodes(self, mark: kv.Mark, tokens: int) -> bool:
        """Whether a pass on a filled cache decodes, or else reads a prompt.

        Raises:
            SkipError: where nobody says so, and the plan is for one of the two.
        """
        if (found := decodes(tokens, mark.decoded)) is not None:
            return found
        if self.plan.phase == "both" or self.plan.empty:
            return mark.decoded  # the plan holds in both: this is for those who listen
        raise SkipError(
            f"this pass of {tokens} tokens on a filled KV cache is a chunk of a prompt or a draft to be verified, and "
            f"a plan of phase {self.plan.phase!r} treats them differently. generate() says which; in a loop of your "
            f"own, `with applied.in_phase('prefill'):` (or 'decode') does. A compiled pass can be told neither: run "
            f"such passes uncompiled"
        )

    def hide_in(self, cache: Any, mark: kv.Mark) -> None:
        """Take the layers of left-out attention out of a cache."""
        if self.hide:
            gone = hide(cache, self.hide, self.layers)
            mark.stood_for = {i: type(layer) for i, layer in gone.items()}
        mark.hidden, mark.kinds = True, None


@dataclass(slots=True)
class RunningPass:
    """What one pass of the decoder leaves out.

    Attributes:
        attn: the planned attention is left out.
        mlp: the planned feed-forwards are.
        extra: further feed-forwards that are -> factor.
        decode: tokens of a sequence that runs already.
        cache: that was given, or None.
        mark: of the cache.
        after: called when the pass is over.
    """

    attn: bool = False
    mlp: bool = False
    extra: dict[int, float | None] = field(default_factory=dict)
    decode: bool = False
    cache: Any = None
    mark: kv.Mark | None = None
    after: list[Callable[[], None]] = field(default_factory=list)


class DecoderPass(ModelPass):
    """At the decoder: which phase a pass is of, what it leaves out, and the cache.

    Attributes:
        state: what the applied plan knows; another one while it is replaced.
    """

    __slots__ = ("reader", "state")

    def __init__(self, state: PlanState, reader: PassReader) -> None:
        self.state = state
        self.reader = reader

    def open(self, plan: ActivePlan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Decide what this pass leaves out, and tell those who listen."""
        plan.batch = 1
        after: list[Callable[[], None]] = []
        told: list[Listener] = []
        while True:
            state = self.state
            running = self._decide(plan, args, kwargs)
            running.after, extended = after, len(running.extra)
            if torch.compiler.is_compiling() or not (state.enabled or state.drafting):
                return
            state.last = running.mark
            if listeners := state.listeners():
                fresh = running.mark is None or not running.mark.filled
                now = self.reader.describe(args, kwargs, running.cache, running.decode, fresh=fresh)
                for listener in [each for each in listeners if each not in told]:
                    told.append(listener)
                    if callable(done := listener(now)):
                        after.append(done)
            # a listener may have replaced the plan, or extended it: this pass follows what holds now
            if self.state is state and len(running.extra) == extended:
                return

    def _decide(self, plan: ActivePlan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RunningPass:
        """What this pass leaves out, as the plan's conditions."""
        state, phase = self.state, self.state.plan.phase
        extra, decode, cache, mark = _NO_EXTENSION, False, None, None
        if state.drafting:
            attn = mlp = decode = True
        elif not state.enabled:
            attn = mlp = False
        else:
            cache = self.reader.cache(args, kwargs)
            if cache is not None:
                mark = state.mark(cache)
                tokens = self.reader.tokens(args, kwargs)
                # a pass of one token must not wait for the GPU: there, a reset is noticed at a prompt of several only
                if mark.filled and not torch.compiler.is_compiling() and empty(cache, wait=tokens > 1):
                    state.restart(mark)
                decode = mark.filled and state.decodes(mark, tokens)
                if torch.compiler.is_compiling():
                    mark.filled = True  # no `close` comes in a graph: a prompt that was read compiled is a prompt too
                if not mark.hidden and (decode or phase != "decode"):
                    state.hide_in(cache, mark)
                if decode:
                    extra = mark.extra
                    if mark.extra and not torch.compiler.is_compiling():
                        state.extend(mark.extra)  # the sequence may have begun under another handle
            attn = phase != "decode" if mark is None else mark.hidden
            mlp = phase == "both" or decode == (phase == "decode")
        plan.holds = {ATTN: attn, MLP: mlp, BOTH: attn and mlp}
        for layer in extra:
            plan.holds[extended_mlp(layer)] = True
            plan.holds[extended_layer(layer)] = attn
        plan.state = running = RunningPass(attn, mlp, extra, decode, cache, mark)
        return running

    def end(self, plan: ActivePlan) -> None:
        """Tell those who listened that the pass is over."""
        if plan.state is not None:
            for done in plan.state.after:
                done()

    def close(self, plan: ActivePlan, out: Any) -> None:
        """Check that all was left out, mark the cache and enter the pass in the ledger."""
        state, running = self.state, plan.state
        if not (state.enabled or state.drafting):
            return
        left_out = state.left_out(running.attn, running.mlp, running.extra)
        if plan.left_out != len(left_out):
            state.lost()
        if running.attn and state.plan.attn:
            _place_attentions(out, state.plan.attn, state.layers)
        mark, cache = running.mark, running.cache
        if mark is None and not state.drafting and (cache := self.reader.made(out)) is not None:
            state.last = mark = state.mark(cache, made=True)
            if state.plan.phase != "decode":
                state.hide_in(cache, mark)
        if mark is None:
            state.uncached += not state.drafting
        elif not mark.filled:
            mark.filled = True
        elif running.decode and not mark.decoded:
            mark.decoded = True
        state.stats.passed_without(left_out)
        state.ledger.note_memory(cache, mark)


def _place_attentions(out: Any, left_out: Collection[int], layers: int) -> None:
    """Put None where no attention ran: the maps are collected as they come, and would move to other layers' places."""
    found = getattr(out, "attentions", None)
    if isinstance(found, tuple) and len(found) == layers - len(left_out):
        seen = iter(found)
        out.attentions = tuple(None if layer in left_out else next(seen) for layer in range(layers))
