"""Engine: a sublayer plan on a language model, through plain forwards and `generate`, with its cache kept right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from skipguide.errors import NoEffectError, SkipError
from skipguide.gate import Call, Frame, Gate, active_frames, gate_of
from skipguide.kv import check_kind, hide, length
from skipguide.llm import cache as kv
from skipguide.llm.families import SublayerMap, sublayer_map
from skipguide.llm.passes import Pass, PassReader
from skipguide.llm.plan import SublayerPlan, check_scales, sublayer_layers
from skipguide.llm.sites import AbsentSublayer, LayerAct, LMFrame, ServantAct
from skipguide.llm.stats import SublayerLedger

PassListener = Callable[[Pass], None]


class AppliedSublayers:
    """A sublayer plan in force on a model. Leave the `with` block or call `remove()` to end it.

    Attributes:
        plan: the plan.
        map: the model's sublayers.
        stats: the ledger: runs and skips per sublayer, skipped fraction, bytes of keys and values held and saved.
        enabled: False runs the whole model for a while (its cache must then be a full one); a plain switch.
        listeners: called with the `Pass` before every pass of the model.
    """

    def __init__(self, plan: SublayerPlan, model: nn.Module, *, cached: bool = True, everywhere: bool = False) -> None:
        self.plan = plan
        self.map = sublayer_map(model)
        self.cached = cached
        self.enabled = True
        self.listeners: list[PassListener] = []
        self.stats = SublayerLedger(self.map)
        _check(plan, self.map, cached)
        self._root = gate_of(self.map.decoder)
        self._acts: dict[int, Any] = {self._root.key: _DecoderAct(self)}
        self._gates: list[Gate] = []
        self._hide = tuple(self.map.site(i, "attn").cache_index for i in plan.attn)
        self._drafting = 0
        self._last: kv.Mark | None = None
        self._elsewhere = 0
        self._everywhere = everywhere
        try:
            self._install(self._root)
            for i in sorted({*plan.attn, *plan.mlp}):
                self._stand_at(i)
        except BaseException:
            self._uninstall()
            raise
        self._root.handlers += (self._outside,)
        self._frame: LMFrame | None = self._new_frame()
        self._frame.enter()

    # -- installation -------------------------------------------------------------------------------------------

    def _new_frame(self) -> LMFrame:
        return LMFrame(self._root, self._acts)

    def _install(self, gate: Gate) -> None:
        gate.install(inside=gate is self._root)
        self._gates.append(gate)

    def _stand_at(self, layer: int) -> None:
        """Gates at what is left out in a layer, where there is none yet."""
        plan, sites = self.plan, self.map
        for part in ("attn", "mlp"):
            if part == "attn" and layer not in plan.attn:
                continue
            site = sites.site(layer, part)
            self._put(
                site.module, AbsentSublayer(site, planned=layer in getattr(plan, part), add_in_place=sites.parallel)
            )
            for servant in site.serves:
                self._put(servant, ServantAct(site, planned=layer in getattr(plan, part)))
        act = LayerAct(layer, sites, plan)
        if act.useful:
            self._put(sites.layers[layer], act)

    def _put(self, module: nn.Module, act: Any) -> None:
        gate = gate_of(module)
        if gate.key not in self._acts:
            self._install(gate)
            self._acts[gate.key] = act

    def _uninstall(self) -> None:
        while self._gates:
            self._gates.pop().remove()

    def remove(self) -> None:
        """End the plan; nothing of it is left on the model. A second call does nothing."""
        if self._frame is None:
            return
        self._frame.leave()
        self._frame.close()
        self._frame = None
        self._root.handlers = tuple(h for h in self._root.handlers if h != self._outside)
        self._uninstall()

    def __enter__(self) -> AppliedSublayers:
        """Return the handle."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        """End the plan."""
        self.remove()
        if kind is None and self._elsewhere and not self.stats.passes:
            raise NoEffectError(
                f"the plan was applied in one thread, and all {self._elsewhere} passes ran in others, with the whole "
                f"model: use plan.apply(model, everywhere=True), or `with applied.running():` in those threads"
            )

    @contextmanager
    def running(self) -> Iterator[AppliedSublayers]:
        """The plan in another thread or task, for as long as it is applied."""
        frame = self._new_frame()
        frame.enter()
        try:
            yield self
        finally:
            frame.leave()

    def _outside(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A handler at the decoder: a pass of a thread in which the plan was not applied."""
        if any(getattr(frame, "acts", None) is self._acts for frame in active_frames()):
            return call(*args, **kwargs)
        if self._everywhere:
            with self.running():
                return call(*args, **kwargs)
        self._elsewhere += 1
        return call(*args, **kwargs)

    # -- a sequence ---------------------------------------------------------------------------------------------

    def extend(self, mlp: Any, mlp_scale: Mapping[int, float] | None = None) -> None:
        """Leave out more feed-forwards for the rest of the sequence that ran last, from the next pass on.

        The next sequence starts with the plan alone. Attention cannot be added: its keys for the next tokens would
        be missing.

        Args:
            mlp: layers whose feed-forward is left out too; those that already are stay as they are.
            mlp_scale: layer -> factor.

        Raises:
            SkipError: for a layer the model does not have, a bad scale, or before any pass with a cache.
        """
        layers = sublayer_layers(mlp)
        scales = check_scales(mlp_scale or {}, layers, "mlp")
        for layer in layers:
            self.map.site(layer, "mlp")
        _check_scale(bool(scales), self.map)
        if self._last is None:
            raise SkipError("extend() adds to a sequence that is running: call it after a pass with a KV cache")
        for layer in layers:
            if layer not in self.plan.mlp and layer not in self._last.extra:
                self._stand_at(layer)
                self._last.extra[layer] = scales.get(layer)

    @property
    def extra(self) -> dict[int, float | None]:
        """Feed-forwards that `extend` left out in the sequence that ran last -> their factor (None: 1)."""
        return dict(self._last.extra) if self._last else {}

    def drafting(self, cache: Any) -> AbstractContextManager[None]:
        """Run the skipped model on the full model's cache; afterwards the cache is as it was, to the same objects.

        Inside the block every pass leaves the sublayers out, whatever the phase and `enabled` say. The layers of
        left-out attention are hidden from the cache meanwhile; at the end they stand there again, and what the passes
        added to the other layers is cropped. No mark is left on the cache.

        Raises:
            SkipError: for a cache that cannot be cropped.
        """
        return self._draft(cache)

    @contextmanager
    def _draft(self, cache: Any) -> Iterator[None]:
        with kv.hidden(cache, self._hide, self.map.num_layers):
            self._drafting += 1
            try:
                yield
            finally:
                self._drafting -= 1


class _DecoderAct:
    """At the decoder: which phase this pass is, what it leaves out, and the cache."""

    __slots__ = ("applied", "reader")

    def __init__(self, applied: AppliedSublayers) -> None:
        self.applied = applied
        self.reader = PassReader(applied.map.decoder)

    def __call__(self, frame: Frame, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert isinstance(frame, LMFrame)
        applied = self.applied
        plan, compiling = applied.plan, torch.compiler.is_compiling()
        tokens, cache = self.reader.tokens(args, kwargs), self.reader.cache(args, kwargs)
        mark: kv.Mark | None = None
        if not applied.enabled and not applied._drafting:
            frame.attn_off = frame.mlp_off = False
            return call(*args, **kwargs)
        if cache is not None and not applied._drafting:
            mark = self._mark(cache)
            decode = tokens == 1 and mark.filled
            if not mark.hidden and (plan.phase != "decode" or decode):
                self._hide(cache, mark)
            frame.attn_off = mark.hidden
            frame.extra = mark.extra if decode else _NOTHING
        else:
            decode = bool(applied._drafting)
            frame.attn_off = bool(applied._drafting) or plan.phase != "decode"
            frame.extra = _NOTHING
        frame.mlp_off = bool(applied._drafting) or plan.phase == "both" or decode == (plan.phase == "decode")
        if compiling:
            return call(*args, **kwargs)
        applied._last = mark
        frame.batch = 1
        frame.hits.clear()
        if applied.listeners:
            now = self.reader.describe(args, kwargs, cache, decode, fresh=mark is None or not mark.filled)
            for listener in applied.listeners:
                listener(now)
        try:
            out = call(*args, **kwargs)
            self._verify(frame)
        finally:
            frame.batch = 0
            frame.seen.clear()
        if mark is None and not applied._drafting and (cache := self.reader.made(out)) is not None:
            mark = self._mark(cache, made=True)
            if plan.phase != "decode":
                self._hide(cache, mark)
            applied._last = mark
        if mark is not None and not mark.filled:
            mark.filled = True
        applied.stats.enter(frame, cache, mark)
        return out

    def _mark(self, cache: Any, made: bool = False) -> kv.Mark:
        plan = self.applied.plan
        mark = kv.mark_of(cache)
        if mark is not None:
            if mark.plan is not plan and mark.plan != plan:
                raise SkipError(
                    f"this KV cache was made under another plan ({mark.plan}) than the one that is applied ({plan}): "
                    f"start a new sequence, or go on under the plan that it was made under"
                )
            return mark
        check_kind(cache)
        if not self.applied.cached:
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

    def _hide(self, cache: Any, mark: kv.Mark) -> None:
        if self.applied._hide:
            gone = hide(cache, self.applied._hide, self.applied.map.num_layers)
            mark.stood_for = {i: type(layer) for i, layer in gone.items()}
        mark.hidden = True

    def _verify(self, frame: LMFrame) -> None:
        """Every gate that should have left something out did; else say who took it."""
        applied = self.applied
        for gate in applied._gates:
            if gate.key not in frame.seen and not gate.reachable():
                raise gate.lost()


_NOTHING: dict[int, float | None] = {}


def _check(plan: SublayerPlan, sites: SublayerMap, cached: bool) -> None:
    for layer in plan.attn:
        sites.site(layer, "attn")
        if layer in sites.producers:
            raise SkipError(
                f"attention of layer {layer} cannot be left out: later layers of {type(sites.model).__name__} read its "
                f"keys and values (shared KV cache)"
            )
    for layer in plan.mlp:
        sites.site(layer, "mlp")
    keeps = {site.cache_index for site in sites.sites if site.part == "attn" and site.layer not in plan.attn}
    if cached and plan.attn and not keeps:
        raise SkipError(
            f"every attention of {type(sites.model).__name__} is left out, and a KV cache needs one that is kept: keep "
            f"one, or say cached=False at apply and run with use_cache=False"
        )
    _check_scale(bool(plan.attn_scale or plan.mlp_scale), sites)


def _check_scale(scaled: bool, sites: SublayerMap) -> None:
    if scaled and not sites.scalable:
        why = "run attention and feed-forward in parallel" if sites.parallel else "are not h + sublayer(norm(h))"
        raise SkipError(
            f"a scale per sublayer is not defined for {type(sites.model).__name__}: its layers {why}. Leave attn_scale "
            f"and mlp_scale empty"
        )
