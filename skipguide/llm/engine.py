"""Engine: a sublayer plan on a language model, through plain forwards and `generate`, with its cache kept right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from threading import get_ident
from typing import Any
from weakref import WeakMethod

import torch
from torch import nn

from skipguide.active import Call, without
from skipguide.errors import NoEffectError, SkipError
from skipguide.gate import Gate, gate_of
from skipguide.llm import cache as kv
from skipguide.llm.entry import DecoderAct, Listener, Run
from skipguide.llm.passes import PassReader
from skipguide.llm.plan import SublayerPlan, check_scales, sublayer_layers
from skipguide.llm.sites import LMFrame, acts_at, frame_on
from skipguide.llm.stats import SublayerLedger
from skipguide.llm.sublayers import SublayerMap, sublayer_map


class AppliedSublayers:
    """A sublayer plan in force on a model. Leave the `with` block or call `remove()` to end it.

    Attributes:
        plan: the plan.
        map: the model's sublayers.
        stats: the ledger: runs and skips per sublayer, skipped fraction, bytes of keys and values held and saved.
        listeners: called with the `Pass` before every pass of the model; what one returns is called after the pass.
    """

    def __init__(
        self,
        plan: SublayerPlan,
        model: nn.Module,
        *,
        cached: bool = True,
        everywhere: bool = False,
        frame: LMFrame | None = None,
    ) -> None:
        self.plan = plan
        self.map = sublayer_map(model)
        check_plan(plan, self.map, cached)
        self._root = gate_of(self.map.decoder)
        refuse_second(self._root, frame)
        self.listeners: list[Listener] = []
        self._run = Run(
            plan, self.map, cached, _weakly(self._lost), _weakly(self._stand_in_too), _weakly(self._listening)
        )
        self.stats: SublayerLedger = self._run.stats
        self._acts: dict[int, Any] = {}
        self._gates: list[Gate] = []
        self._extended: set[int] = set()
        self._elsewhere = 0
        self._everywhere = everywhere
        try:
            self._put(self.map.decoder, DecoderAct(self._run, PassReader(self.map.decoder)))
            for i in sorted({*plan.attn, *plan.mlp}):
                self._stand_in(i)
        except BaseException:
            self._uninstall()
            raise
        # the model holds its plan: a handle that nobody keeps does not end it
        self._root.handlers += (self._outside,)
        self._frame: LMFrame | None = frame
        if frame is not None:  # entered already, where the plan was asked for
            frame.adopt(self._acts, self._run.lost)
        else:
            self._frame = self._new_frame()
            self._frame.enter()

    def __del__(self) -> None:
        """The model is gone, and with it the plan."""
        if (frame := self.__dict__.get("_frame")) is not None:
            frame.close()

    # -- installation -------------------------------------------------------------------------------------------

    def _new_frame(self) -> LMFrame:
        return LMFrame(self._root.key, self._acts, self._run.lost)

    def _stand_in(self, layer: int, extended: bool = False) -> None:
        for module, act in acts_at(layer, self.map, self.plan, extended):
            self._put(module, act)

    def _stand_in_too(self, mlp: Iterable[int]) -> None:
        for layer in mlp:
            if layer not in self._extended:
                self._stand_in(layer, extended=True)
                self._extended.add(layer)

    def _listening(self) -> list[Listener]:
        return self.listeners

    def _put(self, module: nn.Module, act: Any) -> None:
        gate = gate_of(module)
        if gate.key not in self._acts:
            gate.install(inside=gate is self._root)
            self._gates.append(gate)
            self._acts[gate.key] = act

    def _uninstall(self) -> None:
        while self._gates:
            self._gates.pop().remove()

    def _lost(self) -> None:
        """Something did not happen as planned: raise if a gate was replaced."""
        names = {id(module): name for name, module in self.map.model.named_modules()}
        for gate in self._gates:
            if not gate.reachable() or gate.key not in names:
                raise gate.lost(names.get(gate.key, ""))

    def remove(self) -> None:
        """End the plan; nothing of it is left on the model. A second call does nothing."""
        if self._frame is None:
            return
        self._frame.leave()
        self._frame.close()
        self._frame = None
        self._root.handlers = tuple(handler for handler in self._root.handlers if handler != self._outside)
        self._uninstall()

    def __enter__(self) -> AppliedSublayers:
        """Return the handle."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        """End the plan.

        Raises:
            NoEffectError: if the model ran, but only in threads that the plan does not reach, or only without a KV
                cache, where phase="decode" leaves nothing out.
        """
        self.remove()
        if kind is None:
            self._check_effect()

    def _check_effect(self) -> None:
        passes = self.stats.passes
        if self._elsewhere and not passes:
            raise NoEffectError(
                f"the plan was applied in one thread, and all {self._elsewhere} passes ran in others, with the whole "
                f"model: use plan.apply(model, everywhere=True) with applied.plan, or, in those threads, `with "
                f"applied.running():` of what plan.apply() returns"
            )
        # a single pass is a prompt; more of them are a generation that never decodes
        if self.plan.phase == "decode" and not self.plan.empty and 1 < self._run.uncached == passes:
            raise NoEffectError(
                f'phase="decode" leaves out in one-token passes on a KV cache, and all {passes} passes ran without a '
                f'cache, with the whole model: use a cache, or phase="both"'
            )

    # -- threads ------------------------------------------------------------------------------------------------

    @contextmanager
    def running(self) -> Iterator[AppliedSublayers]:
        """The plan in another thread or task, for as long as it is applied."""
        if self._frame is None:
            raise SkipError("this plan was removed from its model: apply it again")
        frame = self._new_frame()
        frame.enter()
        try:
            yield self
        finally:
            frame.leave()

    def _outside(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A handler at the decoder: is this the pass of a thread in which no plan was applied?"""
        if (frame := frame_on(self._root)) is not None:
            if torch.compiler.is_compiling() or frame.acts is not self._acts or frame.thread == get_ident():
                return call(*args, **kwargs)
            # asyncio.to_thread and thread pools of servers hand the context on: two passes at once need two frames
            with without(frame), self.running():
                return call(*args, **kwargs)
        if self._everywhere:
            with self.running():
                return call(*args, **kwargs)
        self._elsewhere += 1
        return call(*args, **kwargs)

    # -- a sequence ---------------------------------------------------------------------------------------------

    @property
    def enabled(self) -> bool:
        """False runs the whole model for a while, on caches of its own: nothing is left out, marked or counted."""
        return self._run.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._run.enabled = bool(value)

    def extend(self, mlp: Iterable[int], mlp_scale: Mapping[int, float] | None = None) -> None:
        """Leave out more feed-forwards for the rest of the sequence that ran last, from its next decode pass on.

        The next sequence starts with the plan alone. Attention cannot be added: the keys of the next tokens would be
        missing if it ever ran again, and those of the last ones are there already.

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
        if (mark := self._run.last) is None or self._frame is None:
            raise SkipError("extend() adds to a sequence that is running: call it after a pass with a KV cache")
        self.extend_in(mark, layers, scales)

    def extend_in(self, mark: kv.Mark, mlp: Iterable[int], mlp_scale: Mapping[int, float]) -> None:
        """The same, unchecked, for the sequence of a mark: with several threads, the last pass can be another's."""
        for layer in mlp:
            if layer not in self.plan.mlp and layer not in mark.extra:
                self._stand_in_too([layer])
                mark.extra[layer] = mlp_scale.get(layer)

    @property
    def extra(self) -> dict[int, float | None]:
        """Feed-forwards that `extend` left out in the sequence that ran last -> their factor (None: 1)."""
        return dict(self._run.last.extra) if self._run.last else {}

    def drafting(self, cache: Any) -> AbstractContextManager[None]:
        """Run the skipped model on the full model's cache; afterwards the cache is as it was, to the same objects.

        Inside the block every pass leaves the sublayers out, whatever the phase and `enabled` say. The layers of
        left-out attention are hidden from the cache meanwhile; at the end they stand there again, and what the passes
        added to the other layers is cropped. No mark is left on the cache, and nothing is counted as its memory.

        Raises:
            SkipError: for a cache that cannot be cropped.
        """
        return self._draft(cache)

    @contextmanager
    def _draft(self, cache: Any) -> Iterator[None]:
        with kv.hidden(cache, self._run.hide, self.map.num_layers):
            self._run.drafting += 1
            try:
                yield
            finally:
                self._run.drafting -= 1


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A bound method that does not keep its object alive; when that is gone, nothing happens."""
    weak = WeakMethod(method)

    def call(*args: Any) -> Any:
        return None if (alive := weak()) is None else alive(*args)

    return call


def refuse_second(root: Gate, own: LMFrame | None = None) -> None:
    """Refuse a plan where another one holds, or waits for its statistics.

    Args:
        root: the gate of the model's decoder.
        own: the frame of the plan itself, if it has one by now.
    """
    if (held := frame_on(root)) is not None and held is not own:
        raise SkipError(
            "a sublayer plan is applied to this model already: remove it first, or make one plan of the two"
        )


def refuse_skipping(sites: SublayerMap) -> None:
    """Refuse to measure a model that sublayers are left out of.

    Raises:
        SkipError: if a plan is applied to it, not empty and enabled.
    """
    frame = frame_on(gate_of(sites.decoder))
    act: Any = None if frame is None else frame.acts.get(frame.key)
    if act is not None and act.run.enabled and not act.run.plan.empty:
        raise SkipError(
            "sublayers are left out of this model (AdaSkip, UnifiedSkip or a plan is applied), and only the whole "
            "model can be measured: remove that first"
        )


def check_plan(plan: SublayerPlan, sites: SublayerMap, cached: bool = True) -> None:
    """Refuse a plan that the model cannot run.

    Raises:
        SkipError: see `SublayerPlan.apply`.
    """
    for layer in plan.attn:
        name = sites.site(layer, "attn").name
        if layer in sites.producers:
            raise SkipError(
                f"{name} cannot be left out: later layers of {type(sites.model).__name__} read its keys and values "
                f"(shared KV cache)"
            )
    for layer in plan.mlp:
        sites.site(layer, "mlp")
    kept = [site for site in sites.sites if site.part == "attn" and site.layer not in plan.attn]
    if cached and plan.attn and not kept:
        raise SkipError(
            f"every attention of {type(sites.model).__name__} is left out, and a KV cache needs one that is kept: keep "
            f"one, or say plan.apply(model, cached=False) and run with use_cache=False"
        )
    _check_scale(bool(plan.attn_scale or plan.mlp_scale), sites)


def _check_scale(scaled: bool, sites: SublayerMap) -> None:
    if scaled and not sites.scalable:
        why = "run attention and feed-forward in parallel" if sites.parallel else "are not h + sublayer(norm(h))"
        raise SkipError(
            f"a scale per sublayer is not defined for {type(sites.model).__name__}: its layers {why}. Leave attn_scale "
            f"and mlp_scale empty"
        )
