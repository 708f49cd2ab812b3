"""Entry: at the decoder, what the running pass leaves out, and the cache it runs on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch

from skipguide.active import Call, Frame
from skipguide.errors import SkipError
from skipguide.hosts.kv_cache import check_kind, empty, hide, length
from skipguide.llm import cache as kv
from skipguide.llm.passes import Pass, PassReader
from skipguide.llm.plan import SublayerPlan
from skipguide.llm.sites import LMFrame
from skipguide.llm.stats import SublayerLedger
from skipguide.llm.sublayers import SublayerMap

Listener = Callable[[Pass], Callable[[], None] | None]
_NOTHING: dict[int, float | None] = {}


class Run:
    """What an applied plan knows at run time. It holds no modules: a frame may outlive the model.

    Attributes:
        enabled: whether the plan holds (drafting goes before it).
        drafting: how many `drafting` blocks are open.
        last: the mark of the cache of the last pass.
        lost: raises if a gate was replaced.
        extend: puts up what leaves out more feed-forwards than the plan names.
        listeners: those that are called before a pass.
        uncached: passes without a cache.
    """

    def __init__(
        self,
        plan: SublayerPlan,
        sites: SublayerMap,
        cached: bool,
        lost: Callable[[], None],
        extend: Callable[[Iterable[int]], None],
        listeners: Callable[[], Sequence[Listener] | None],
    ) -> None:
        self.plan = plan
        self.cached = cached
        self.layers = sites.num_layers
        self.hide = tuple(sites.site(i, "attn").cache_index for i in plan.attn)
        self.enabled = True
        self.drafting = 0
        self.last: kv.Mark | None = None
        self.listeners = listeners
        self.stats = SublayerLedger({(site.layer, site.part): site.name for site in sites.sites}, plan)
        self.lost = lost
        self.extend = extend
        self.uncached = 0

    # -- the cache ----------------------------------------------------------------------------------------------

    def mark(self, cache: Any, made: bool = False) -> kv.Mark:
        """The mark of a cache; a new one if it fits to this plan.

        Args:
            cache: the cache of the running pass.
            made: the model has made it in this pass.
        """
        plan, mark = self.plan, kv.mark_of(cache)
        if mark is not None:
            if mark.plan is not plan and mark.plan != plan:
                raise SkipError(
                    f"this KV cache was made under another plan ({mark.plan}) than the one that is applied ({plan}): "
                    f"start a new sequence, or go on under the plan that it was made under"
                )
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
        mark.filled = False
        mark.extra.clear()

    def hide_in(self, cache: Any, mark: kv.Mark) -> None:
        """Take the layers of left-out attention out of a cache."""
        if self.hide:
            gone = hide(cache, self.hide, self.layers)
            mark.stood_for = {i: type(layer) for i, layer in gone.items()}
        mark.hidden, mark.kinds = True, None


class DecoderAct:
    """At the decoder: which phase this pass is, what it leaves out, and the cache."""

    __slots__ = ("reader", "run")

    def __init__(self, run: Run, reader: PassReader) -> None:
        self.run = run
        self.reader = reader

    def __call__(self, frame: Frame, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the pass."""
        assert isinstance(frame, LMFrame)
        run, phase = self.run, self.run.plan.phase
        mark: kv.Mark | None = None
        cache: Any = None
        frame.extra = _NOTHING
        if run.drafting:
            frame.attn_off = frame.mlp_off = decode = True
        elif not run.enabled:
            frame.attn_off = frame.mlp_off = False
            return self._inside(frame, call, args, kwargs)
        else:
            cache = self.reader.cache(args, kwargs)
            decode = False
            if cache is not None:
                mark = run.mark(cache)
                single = self.reader.tokens(args, kwargs) == 1
                # a pass of one token must not wait for the GPU: there, a reset is noticed at a prompt of several only
                if mark.filled and not torch.compiler.is_compiling() and empty(cache, wait=not single):
                    run.restart(mark)
                decode = mark.filled and single
                if not mark.hidden and (decode or phase != "decode"):
                    run.hide_in(cache, mark)
                if decode:
                    frame.extra = mark.extra
                    if mark.extra and not torch.compiler.is_compiling():
                        run.extend(mark.extra)  # the sequence may have begun under another handle
            frame.attn_off = phase != "decode" if mark is None else mark.hidden
            frame.mlp_off = phase == "both" or decode == (phase == "decode")
        if torch.compiler.is_compiling():
            return call(*args, **kwargs)
        run.last = mark
        after: list[Callable[[], None]] = []
        if listeners := run.listeners():
            now = self.reader.describe(args, kwargs, cache, decode, fresh=mark is None or not mark.filled)
            after = [done for listener in listeners if callable(done := listener(now))]
        frame.hits = 0
        try:
            out = self._inside(frame, call, args, kwargs)
        finally:
            for done in after:
                done()
        if frame.hits != run.stats.expected(frame):
            run.lost()
        if frame.attn_off:
            _place_attentions(out, run.plan.attn, run.layers)
        if mark is None and not run.drafting and (cache := self.reader.made(out)) is not None:
            run.last = mark = run.mark(cache, made=True)
            if phase != "decode":
                run.hide_in(cache, mark)
        if mark is None:
            run.uncached += not run.drafting
        elif not mark.filled:
            mark.filled = True
        run.stats.enter(frame, cache, mark)
        return out

    @staticmethod
    def _inside(frame: LMFrame, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return call(*args, **kwargs)
        frame.batch = 1
        try:
            return call(*args, **kwargs)
        finally:
            frame.batch = 0
            frame.seen.clear()


def _place_attentions(out: Any, left_out: Collection[int], layers: int) -> None:
    """Put None where no attention ran: the maps are collected as they come, and would move to other layers' places."""
    found = getattr(out, "attentions", None)
    if left_out and isinstance(found, tuple) and len(found) == layers - len(left_out):
        seen = iter(found)
        out.attentions = tuple(None if layer in left_out else next(seen) for layer in range(layers))
