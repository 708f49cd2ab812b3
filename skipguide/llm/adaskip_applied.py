"""AdaSkip in force: calibration on the first request, the plan, and the online stage of every request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import RLock, get_ident
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from skipguide.errors import NoEffectError, SkipError
from skipguide.llm import cache as kv
from skipguide.llm.adaskip_settings import AdaSkipSettings
from skipguide.llm.applied import AppliedSublayers
from skipguide.llm.cost import SublayerCosts
from skipguide.llm.find import sublayer_map
from skipguide.llm.ledger import SublayerLedger
from skipguide.llm.online import OnlineWindow
from skipguide.llm.passes import Pass, Said, said
from skipguide.llm.plan import SublayerPlan
from skipguide.llm.plan_checks import check_plan
from skipguide.llm.similarity import RequestMeter, StatsMeter, SublayerStats
from skipguide.llm.sublayers import SublayerMap
from skipguide.llm.watch import OnSublayer, watch
from skipguide.shown import Row, Shown, ledger_rows
from skipguide.stats import Stats

logger = logging.getLogger(__name__)
REFERENCE_REQUESTS = 20  # the published code measures the first 20 prompts, whatever comes after


class AppliedAdaSkip(Shown):
    """AdaSkip in force on a model. Leave the `with` block or call `remove()` to end it.

    Attributes:
        settings: the `AdaSkip`.
        map: the model's sublayers.
        statistics: what the choice rests on; None while the first request is being measured.
        costs: the times that `cost_aware` chose by.
        window: the online stage of the sequence that was decoded last, or None.
    """

    def __init__(
        self,
        settings: AdaSkipSettings,
        model: nn.Module,
        stats: SublayerStats | None,
        costs: SublayerCosts | None,
        everywhere: bool = False,
    ) -> None:
        self.settings = settings
        self._everywhere = everywhere
        self.model = model
        self.map: SublayerMap = sublayer_map(model)
        self.statistics: SublayerStats | None = None
        self.costs = costs
        self.window: OnlineWindow | None = None
        self._plan: SublayerPlan | None = None
        self._inner: AppliedSublayers | None = None
        self._windows: WeakKeyDictionary[Any, OnlineWindow] = WeakKeyDictionary()
        self._calibration: _Calibration | None = None
        self._thresholds: list[float] = []
        self._told = False
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
            self._check_number()
            # nothing is left out yet, and whichever task runs the first request, the plan will hold in all
            self._inner = AppliedSublayers(SublayerPlan(phase="decode"), self.map, everywhere=everywhere)
            self._inner.made_by = ref(self)
            self._calibration = _Calibration(self)
            self._inner.listeners.append(self._calibration.before_pass)

    @property
    def plan(self) -> SublayerPlan | None:
        """What is left out; None while the first request is being measured."""
        return self._plan

    @property
    def extra(self) -> dict[int, float | None]:
        """MLPs that the online stage left out in the sequence that ran last -> their scale."""
        return {} if self._inner is None else self._inner.extra

    @property
    def stats(self) -> SublayerLedger:
        """The ledger: runs and skips per sublayer, skipped fraction, bytes of keys and values saved."""
        if self._inner is not None and self._calibration is None:
            return self._inner.stats
        return SublayerLedger(tuple(site.name for site in self.map.sites), Stats())

    def _heading(self) -> str:
        doing = "measuring the first request" if self._calibration is not None else "chosen"
        return f"AdaSkip ({doing}): {self._inner._heading() if self._inner is not None else 'removed'}"

    def _rows(self) -> list[Row]:
        return ledger_rows(self.stats.calls, self.stats.skips)

    def __enter__(self) -> AppliedAdaSkip:
        """Return the handle."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        """End it.

        Raises:
            NoEffectError: if the model ran, but nothing of it could be measured or left out.
        """
        try:
            if kind is None and self._calibration is not None:
                self._calibration.check_effect()
            elif self._inner is not None and self._calibration is None:
                self._inner.__exit__(kind, *exc)
        finally:
            try:
                self.remove()
            except BaseException:  # Ctrl-C: what was broken off is done again
                self.remove()
                raise

    def remove(self) -> None:
        """End it; nothing is left on the model. A second call does nothing."""
        if self._inner is not None:
            self._inner.remove()

    @contextmanager
    def running(self) -> Iterator[AppliedAdaSkip]:
        """Let it hold in another thread or task too, inside the block and for as long as it is applied.

        Raises:
            SkipError: if it was removed.
        """
        assert self._inner is not None
        with self._inner.running():
            yield self

    def in_phase(self, phase: Said) -> AbstractContextManager[None]:
        """What passes of several tokens on a filled cache are about, as `AppliedSublayers.in_phase` says it."""
        return said(phase)

    @property
    def elsewhere(self) -> int:
        """Passes in threads that it does not reach."""
        return 0 if self._inner is None else self._inner.elsewhere

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
        if self._inner is None:
            self._inner = AppliedSublayers(plan, self.map, everywhere=self._everywhere)
            self._inner.made_by = ref(self)
        else:
            self._inner.replace(plan)
        self._plan = plan
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
        """Watch the first one-token passes of each sequence, then extend the plan; returns how to stop watching."""
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
        if window.similarity or window.given_up:
            return None
        if now.tokens > 1:
            # what is rejected of a draft would be measured with it, and the text would depend on who drafted
            window.given_up = True
            if not self._told:
                self._told = True
                logger.warning(
                    "several tokens at once are decoded: AdaSkip's online stage measures single ones, and adds nothing "
                    "to such a sequence (online=False is the same without this warning)"
                )
            return None
        if not window.full:
            window.seen += 1
            watching = ExitStack()
            watching.enter_context(watch(self.model, window.enter))
            return watching.close
        found = window.decide(self._thresholds)
        self._inner.extend_in(mark, found, found if self.settings.compensate else {})
        return None

    def _calibrated(self, stats: SublayerStats) -> None:
        """Begin to skip, by the first request's statistics; caches that the whole model filled go on under the plan."""
        assert self._inner is not None
        calibration, self._calibration = self._calibration, None
        try:
            self._begin(stats)
        except BaseException:
            self._calibration = calibration
            raise
        self._inner.listeners[:] = [each for each in self._inner.listeners if each != _listener(calibration)]


def _listener(calibration: _Calibration | None) -> Any:
    return None if calibration is None else calibration.before_pass


class _Calibration:
    """Measures the first request (or the first 20, as the published code does) at its own prefill.

    It listens to the passes of a plan that leaves nothing out, in the thread or task where AdaSkip was applied and in
    those that have its context; there, and only there, requests are measured.

    Attributes:
        passes: that were seen.
    """

    def __init__(self, applied: AppliedAdaSkip) -> None:
        self.applied = applied
        self.needed = REFERENCE_REQUESTS if applied.settings.reference_compat else 1
        self.meter = StatsMeter(len(applied.map), type(applied.map.model).__name__)
        self.request: RequestMeter | None = None
        self.measuring = 0
        self.lock = RLock()
        self.passes = 0

    def check_effect(self) -> None:
        """Raise if the model ran, and nothing could be measured."""
        elsewhere = self.applied.elsewhere
        if elsewhere and not self.passes:
            raise NoEffectError(
                f"AdaSkip was applied in one thread, and all {elsewhere} passes ran in others, with the whole model: "
                f"apply it with everywhere=True, or run `with applied.running():` in those threads"
            )
        if self.passes and self.request is None and not self.meter.requests:
            raise NoEffectError(
                f"all {self.passes} passes ran with the whole model: no prompt had the two tokens or more that are "
                f"needed to measure it. Give AdaSkip.apply the statistics of AdaSkip.calibrate()"
            )

    def before_pass(self, now: Pass) -> Callable[[], None] | None:
        """Watch a prompt, or choose what to leave out before the first pass after it; returns how to stop watching."""
        if self.measuring == get_ident():  # the passes that measure the times of the sublayers
            return None
        self.lock.acquire()  # tasks in threads of their own wait until one of them has measured
        watching = ExitStack()
        watching.callback(self.lock.release)
        try:
            if self.applied._calibration is self and (entering := self._measure(now)) is not None:
                watching.enter_context(watch(self.applied.model, entering))
        except BaseException:
            watching.close()
            raise
        return watching.close

    def _measure(self, now: Pass) -> OnSublayer | None:
        """What listens to the sublayers in this pass, or None."""
        self.passes += 1
        if now.fresh:
            self._end_request()
        enough = self.meter.requests + (self.request is not None) >= self.needed
        # the published code skips from the next request on; here the request that was measured is decoded so already
        if enough and (now.decode or now.fresh) and not (now.decode and self.applied.settings.reference_compat):
            self._end_request()
            self._finish()
            return None
        if now.decode or now.tokens == 1:
            return None
        if self.request is None:
            self.request = RequestMeter(len(self.applied.map))
        return self.request.entering(now.mask)

    def _end_request(self) -> None:
        if self.request is not None:
            self.meter.add(self.request)
            self.request = None

    def _finish(self) -> None:
        self.measuring = get_ident()
        try:
            with torch.no_grad():
                self.applied._calibrated(self.meter.result())
        finally:
            self.measuring = 0
