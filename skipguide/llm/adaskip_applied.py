"""AdaSkip in force: calibration on the first request, the plan, and the online stage of every request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from threading import RLock, get_ident
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from skipguide.active import Call
from skipguide.errors import NoEffectError, SkipError
from skipguide.gate import gate_of
from skipguide.hosts.kv_cache import length
from skipguide.llm import cache as kv
from skipguide.llm.adaskip import AdaSkip
from skipguide.llm.cost import SublayerCosts
from skipguide.llm.engine import AppliedSublayers, check_plan, refuse_second
from skipguide.llm.online import OnlineWindow
from skipguide.llm.passes import Pass, PassReader
from skipguide.llm.plan import SublayerPlan
from skipguide.llm.similarity import RequestMeter, StatsMeter, SublayerStats
from skipguide.llm.sites import LMFrame, frame_on
from skipguide.llm.stats import SublayerLedger
from skipguide.llm.sublayers import SublayerMap, sublayer_map
from skipguide.llm.watch import watch

logger = logging.getLogger(__name__)
REFERENCE_REQUESTS = 20  # the published code measures the first 20 prompts, whatever comes after


class AppliedAdaSkip:
    """AdaSkip in force on a model. Leave the `with` block or call `remove()` to end it.

    Attributes:
        settings: the `AdaSkip`.
        map: the model's sublayers.
        statistics: what the choice rests on; None while the first request is being measured.
        costs: the times that `cost_aware` chose by.
        window: the online stage of the sequence that was decoded last, or None.
    """

    def __init__(
        self, settings: AdaSkip, model: nn.Module, stats: SublayerStats | None, costs: SublayerCosts | None
    ) -> None:
        self.settings = settings
        self.model = model
        self.map: SublayerMap = sublayer_map(model)
        self.statistics: SublayerStats | None = None
        self.costs = costs
        self.window: OnlineWindow | None = None
        self._inner: AppliedSublayers | None = None
        self._windows: WeakKeyDictionary[Any, OnlineWindow] = WeakKeyDictionary()
        self._calibration: _Calibration | None = None
        self._thresholds: list[float] = []
        for given, kind in ((stats, SublayerStats), (costs, SublayerCosts)):
            if given is not None and not isinstance(given, kind):
                raise SkipError(f"expected {kind.__name__} (or None); got {type(given).__name__}")
        if settings.compensate and not self.map.scalable:
            raise SkipError(
                f"a scale per sublayer is not defined for {type(self.map.model).__name__}, whose layers are not one "
                "sublayer after the other: use AdaSkip(..., compensate=False)"
            )
        if stats is not None:
            self._begin(stats)
        else:
            refuse_second(gate_of(self.map.decoder))
            self._check_number()
            self._calibration = _Calibration(self)

    @property
    def plan(self) -> SublayerPlan | None:
        """What is left out; None while the first request is being measured."""
        return None if self._inner is None else self._inner.plan

    @property
    def extra(self) -> dict[int, float | None]:
        """MLPs that the online stage left out in the sequence that ran last -> their scale."""
        return {} if self._inner is None else self._inner.extra

    @property
    def stats(self) -> SublayerLedger:
        """The ledger: runs and skips per sublayer, skipped fraction, bytes of keys and values saved."""
        if self._inner is not None:
            return self._inner.stats
        return SublayerLedger({(site.layer, site.part): site.name for site in self.map.sites}, SublayerPlan())

    def __enter__(self) -> AppliedAdaSkip:
        """Return the handle."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        """End it.

        Raises:
            NoEffectError: if the model ran, but nothing of it could be measured or left out.
        """
        try:
            if self._inner is not None:
                self._inner.__exit__(kind, *exc)
            elif kind is None and self._calibration is not None:
                self._calibration.check_effect()
        finally:
            self.remove()

    def remove(self) -> None:
        """End it; nothing is left on the model. A second call does nothing."""
        if self._calibration is not None:
            self._calibration.stop()
            self._calibration.frame.leave()
            self._calibration.frame.close()
            self._calibration = None
        if self._inner is not None:
            self._inner.remove()

    # -- the plan -----------------------------------------------------------------------------------------------

    def _check_number(self) -> None:
        """Refuse now what no statistics could make possible; where times decide, they are not known yet."""
        settings, layers = self.settings, len(self.map)
        if settings.cost_aware and settings.count is None:
            return
        number = settings.number(layers)
        available, kind = (2 * layers, "") if settings.part == "both" else (layers, f"{settings.part} ")
        if number > available:
            raise SkipError(f"{number} sublayers are to be left out, but there are {available} {kind}sublayers")
        if number == available and settings.part != "mlp":
            check_plan(SublayerPlan(range(layers)), self.map)

    def _begin(self, stats: SublayerStats) -> None:
        """Choose, and leave out from now on."""
        if stats.num_layers != len(self.map):
            raise SkipError(
                f"the statistics are of {stats.num_layers} layers ({stats.model or 'unknown model'}); "
                f"{type(self.map.model).__name__} has {len(self.map)}"
            )
        if stats.model and stats.model != (model := type(self.map.model).__name__):
            logger.warning("the statistics were measured on a %s, and are used on a %s", stats.model, model)
        settings = self.settings
        if settings.cost_aware and self.costs is None:
            self.costs = settings.measure(self.model, round(stats.tokens))
        plan = settings.plan(stats, self.costs)
        self._thresholds = self._online_thresholds(stats, plan)
        frame = None if self._calibration is None else self._calibration.frame
        self._inner = AppliedSublayers(plan, self.model, frame=frame)
        self.statistics = stats
        logger.info("AdaSkip leaves out attention %s and MLP %s", list(plan.attn), list(plan.mlp))
        if settings.online and settings.phase != "prefill" and settings.part != "attn" and not plan.empty:
            self._inner.listeners.append(self._before_pass)

    def _online_thresholds(self, stats: SublayerStats, plan: SublayerPlan) -> list[float]:
        """Per layer, how similar its MLP must prove.

        As the least similar sublayer of the plan is; or, with costs, as little damage per millisecond as its worst.
        """
        layers = len(self.map)
        chosen = [(stats.attn_similarity[i], "attn", i) for i in plan.attn]
        chosen += [(stats.mlp_similarity[i], "mlp", i) for i in plan.mlp]
        if self.settings.reference_compat or not chosen:
            # the published code resets its threshold to 1 in every prefill
            return [1.0] * layers
        if self.costs is None or not self.settings.cost_aware:
            return [min(chosen)[0]] * layers
        ms = {"attn": self.costs.attn_ms, "mlp": self.costs.mlp_ms}
        worst = max((1 - similarity) / ms[part][i] for similarity, part, i in chosen)
        return [1 - worst * t for t in self.costs.mlp_ms]

    # -- the online stage ---------------------------------------------------------------------------------------

    def _before_pass(self, now: Pass) -> Callable[[], None] | None:
        """Watch the first one-token passes of each sequence, then add what they showed; how to stop watching."""
        if now.fresh and now.cache is not None:  # a cache that was reset serves another request
            self._windows.pop(now.cache, None)
        if not now.decode or (mark := kv.mark_of(now.cache)) is None or self._inner is None:
            return None
        window = self._windows.get(now.cache)
        if window is None:
            layers = len(self.map)
            candidates = set(range(layers)) - {*self._inner.plan.mlp, *mark.extra}
            window = self._windows[now.cache] = OnlineWindow(self.settings.window, layers, candidates)
        self.window = window
        if window.similarity:
            return None
        if not window.full:
            window.seen += 1
            watching = ExitStack()
            watching.enter_context(watch(self.model, window.enter))
            return watching.close
        found = window.decide(self._thresholds)
        self._inner.extend_in(mark, found, found if self.settings.compensate else {})
        return None

    # -- called by the calibration --------------------------------------------------------------------------------

    def _calibrated(self, stats: SublayerStats, caches: Iterable[Any]) -> None:
        """The first request's prompt was measured; `caches` are full of the whole model, and go on under the plan."""
        self._begin(stats)
        self._calibration = None
        for cache in caches:
            if self._inner is not None:
                kv.set_mark(cache, kv.Mark(self._inner.plan, filled=True))


class _Calibration:
    """Measures the first request (or the first 20, as the published code does) at its own prefill.

    Attributes:
        frame: of the plan to come, entered where AdaSkip was applied: there, and only there, requests are measured,
            and whichever task of it runs the first one, the plan will hold in all.
        passes: that were seen there.
        elsewhere: those of other threads.
    """

    def __init__(self, applied: AppliedAdaSkip) -> None:
        self.applied = applied
        self.needed = REFERENCE_REQUESTS if applied.settings.reference_compat else 1
        decoder = applied.map.decoder
        self.reader = PassReader(decoder)
        self.meter = StatsMeter(len(applied.map), type(applied.map.model).__name__)
        self.request: RequestMeter | None = None
        self.running = 0
        self.lock = RLock()
        self.caches: WeakSet[Any] = WeakSet()  # whoever is measured first need not be decoded first
        self.passes = self.elsewhere = 0
        self.root = gate_of(decoder)
        self.root.install(inside=True)
        self.root.handlers += (self._on_pass,)
        self.frame = LMFrame(self.root.key, {}, _nobody)
        self.frame.enter()

    def __del__(self) -> None:
        """The model is gone; a frame that was never adopted goes with it."""
        if not self.frame.acts:
            self.frame.close()

    def check_effect(self) -> None:
        """Raise if the model ran, and nothing could be measured."""
        if self.elsewhere and not self.passes:
            raise NoEffectError(
                f"AdaSkip was applied in one thread, and all {self.elsewhere} passes ran in others, with the whole "
                f"model: measure with AdaSkip.calibrate(), and use AdaSkip.plan(stats).apply(model, everywhere=True)"
            )
        if self.passes and self.request is None and not self.meter.requests:
            raise NoEffectError(
                f"all {self.passes} passes ran with the whole model: no prompt had the two tokens or more that are "
                f"needed to measure it. Give AdaSkip.apply the statistics of AdaSkip.calibrate()"
            )

    def stop(self) -> None:
        """Take the listener away."""
        if self._on_pass in self.root.handlers:
            self.root.handlers = tuple(handler for handler in self.root.handlers if handler != self._on_pass)
            self.root.remove()

    def _on_pass(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.running == get_ident():  # the passes that measure the times of the sublayers
            return call(*args, **kwargs)
        if frame_on(self.root) is not self.frame:
            self.elsewhere += 1
            return call(*args, **kwargs)
        with self.lock:  # tasks in threads of their own wait until one of them has measured
            if (inner := self.applied._inner) is not None:
                return inner._outside(call, args, kwargs)
            return self._measure(call, args, kwargs)

    def _measure(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.passes += 1
        tokens, cache = self.reader.tokens(args, kwargs), self.reader.cache(args, kwargs)
        fresh = cache is None or length(cache) == 0
        if fresh:
            self._end_request()
        decode = tokens == 1 and not fresh
        enough = self.meter.requests + (self.request is not None) >= self.needed
        # the published code skips from the next request on; here the request that was measured is decoded so already
        if enough and (decode or fresh) and not (decode and self.applied.settings.reference_compat):
            self._end_request()
            if decode:
                self.caches.add(cache)
            inner = self._finish()
            return inner._outside(call, args, kwargs)
        if decode or tokens == 1:
            return call(*args, **kwargs)
        mask = self.reader.describe(args, kwargs, cache, decode=False, fresh=fresh).mask
        if self.request is None:
            self.request = RequestMeter(len(self.applied.map))
        with watch(self.applied.model, self.request.entering(mask)):
            out = call(*args, **kwargs)
        if (cache := cache if cache is not None else self.reader.made(out)) is not None:
            self.caches.add(cache)
        return out

    def _end_request(self) -> None:
        if self.request is not None:
            self.meter.add(self.request)
            self.request = None

    def _finish(self) -> AppliedSublayers:
        self.running = get_ident()
        try:
            stats = self.meter.result()
            with torch.no_grad():
                self.applied._calibrated(stats, self.caches)
        finally:
            self.running = 0
        self.stop()
        assert self.applied._inner is not None
        return self.applied._inner


def _nobody() -> None:
    """No gate of the plan stands yet, so none can be lost."""
