"""Applied sublayers: a sublayer plan on a language model, through plain forwards and `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakMethod, ref

from torch import nn

from skipguide.active import ActivePlan, Entry, Intervention, end_everywhere, hold_everywhere
from skipguide.errors import NoEffectError, SkipError
from skipguide.gate import Installation, gate_of
from skipguide.hosts.generation import BATCHING, CANDIDATES, follow_generation, leave_generation, prompt_alone
from skipguide.llm import cache as kv
from skipguide.llm.decoder_pass import DecoderPass, Listener, PlanState
from skipguide.llm.elsewhere import OtherThreads, plan_that_holds, refuse_second
from skipguide.llm.interventions import interventions_at
from skipguide.llm.ledger import SublayerLedger
from skipguide.llm.passes import PassReader, Said, said
from skipguide.llm.plan_checks import check_plan, check_scale
from skipguide.llm.plan_data import SublayerPlanData, check_scales, sublayer_layers
from skipguide.llm.sublayers import SublayerMap
from skipguide.shown import Row, Shown, ledger_rows, passes, settings
from skipguide.stats import Stats


class AppliedSublayers(Shown):
    """A sublayer plan in force on a model. Leave the `with` block or call `remove()` to end it.

    Attributes:
        plan: the plan.
        map: the model's sublayers.
        stats: the ledger: runs and skips per sublayer, skipped fraction, bytes of keys and values held and saved.
        made_by: the handle of a driver that works with this plan, such as AdaSkip's.
        listeners: called with the `Pass` before every pass of the model; what one returns is called after the pass.
    """

    def __init__(
        self,
        plan: SublayerPlanData,
        sublayers: SublayerMap,
        *,
        cached: bool = True,
        everywhere: bool = False,
        drafter: bool = False,
    ) -> None:
        self.plan = plan
        self.map = sublayers
        check_plan(plan, sublayers, cached)
        self._root = gate_of(sublayers.decoder)
        refuse_second(self._root)
        self.listeners: list[Listener] = []
        self.made_by: ref[Any] | None = None
        self._cached = cached
        self._everywhere = everywhere
        self._drafter = drafter
        self._elsewhere = 0
        self._installation = Installation(inside=self._root)
        self._extended: set[int] = set()
        self._active: ActivePlan | None = ActivePlan(self._root, Stats())
        self._active.counts_calls = False
        # the same dictionary in all threads and tasks that the plan reaches
        self._interventions: dict[int, Intervention] = self._active.interventions
        self._pass = DecoderPass(self._new_state(), PassReader(sublayers.decoder))
        self._misses = OtherThreads(self)
        try:
            self._put(sublayers.decoder, self._pass)
            self._intervene()
            # the model holds its plan: dropping the handle does not end it
            hold_everywhere(self._root, self._misses)
            if not drafter:
                follow_generation(sublayers.model, self, BATCHING, CANDIDATES)
            self._active.enter()
        except BaseException:
            self.remove()
            raise

    def __del__(self) -> None:
        """The model is gone, and with it the plan."""
        if (active := self.__dict__.get("_active")) is not None:
            active.abandon()

    @property
    def handle(self) -> Any:
        """What the user was given: this, or the handle that made it and still lives."""
        outer = None if self.made_by is None else self.made_by()
        return self if outer is None else outer

    @property
    def stats(self) -> SublayerLedger:
        """The ledger."""
        return self._pass.state.ledger

    @property
    def elsewhere(self) -> int:
        """Passes in threads that the plan does not reach."""
        return self._elsewhere

    def _heading(self) -> str:
        where = f"on {type(self.map.model).__name__}" if self._active is not None else "removed"
        return f"Sublayer plan ({where}), {passes(self.stats.passes)}: {settings(self.plan)}"

    def _rows(self) -> list[Row]:
        return ledger_rows(self.stats.calls, self.stats.skips)

    # -- installation -------------------------------------------------------------------------------------------

    def _new_state(self) -> PlanState:
        callbacks = (_weakly(self._lost), _weakly(self._extend_layers), _weakly(self._get_listeners))
        return PlanState(self.plan, self.map, self._cached, *callbacks)

    def _intervene(self) -> None:
        for i in sorted({*self.plan.attn, *self.plan.mlp}):
            self._intervene_in(i)

    def replace(self, plan: SublayerPlanData) -> None:
        """Leave out what another plan says from now on, in all threads and tasks that this one has reached.

        Caches that were filled under this plan go on under the other one, so this one must leave nothing out. The
        ledger begins anew.

        Raises:
            SkipError: for a plan that the model cannot run; this one goes on.
        """
        if self._active is None:
            raise SkipError("this plan was removed from its model: apply it again")
        if not self.plan.empty:
            raise SkipError(f"only a plan that leaves nothing out can be replaced in a running model; got {self.plan}")
        check_plan(plan, self.map, self._cached)
        before, self.plan = self.plan, plan
        state = self._new_state()
        state.whole, state.enabled, state.drafting = before, self._pass.state.enabled, self._pass.state.drafting
        self._intervene()
        self._pass.state = state

    def _intervene_in(self, layer: int, extended: bool = False) -> None:
        for module, intervention in interventions_at(layer, self.map, self.plan, extended):
            self._put(module, intervention)

    def _extend_layers(self, mlp: Iterable[int]) -> None:
        for layer in mlp:
            if layer not in self._extended:
                self._intervene_in(layer, extended=True)
                self._extended.add(layer)

    def _get_listeners(self) -> list[Listener]:
        return self.listeners

    def _put(self, module: nn.Module, intervention: Intervention) -> None:
        gate = gate_of(module)
        if gate.key not in self._interventions:
            self._installation.add(gate)
        # an extension of a layer takes the place of the plan's intervention there, which it contains
        self._interventions[gate.key] = intervention

    def _lost(self) -> None:
        """Raise if a gate was replaced; called when less was left out than the plan names."""
        names = {id(module): name for name, module in self.map.model.named_modules()}
        for gate in self._installation.gates:
            if not gate.reachable() or gate.key not in names:
                raise gate.lost(names.get(gate.key, ""))

    def remove(self) -> None:
        """End the plan; nothing of it is left on the model. A second call does nothing."""
        if self._active is None:
            return
        leave_generation(self.map.model, self, BATCHING, CANDIDATES)
        end_everywhere(self._root, self._misses)
        self._active.leave()
        self._active.close()
        self._installation.remove()
        self._active = None  # last: until here it can be repeated

    def __enter__(self) -> AppliedSublayers:
        """Return the handle."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        """End the plan.

        Raises:
            NoEffectError: if the model ran, but only in threads that the plan does not reach, or only without a KV
                cache, where phase="decode" leaves nothing out.
        """
        try:
            self.remove()
        except BaseException:  # Ctrl-C: what was broken off is done again
            self.remove()
            raise
        if kind is None:
            self._check_effect()

    def _check_effect(self) -> None:
        passes = self.stats.passes
        if self._elsewhere and not passes:
            raise NoEffectError(
                f"the plan was applied in one thread, and all {self._elsewhere} passes ran in others, with the whole "
                f"model: apply it with everywhere=True, or run `with applied.running():` in those threads"
            )
        # a single pass is a prompt; more of them are a generation that never decodes
        if self.plan.phase == "decode" and not self.plan.empty and 1 < self._pass.state.uncached == passes:
            raise NoEffectError(
                f'phase="decode" leaves out in one-token passes on a KV cache, and all {passes} passes ran without a '
                f'cache, with the whole model: use a cache, or phase="both"'
            )

    # -- threads ------------------------------------------------------------------------------------------------

    @contextmanager
    def running(self) -> Iterator[AppliedSublayers]:
        """Let the plan hold in another thread or task too, inside the block and for as long as it is applied."""
        if self._active is None:
            raise SkipError("this plan was removed from its model: apply it again")
        entry = Entry(self._active.again())
        try:
            entry.enter()
            yield self
        finally:
            try:
                entry.leave()
            except BaseException:  # Ctrl-C: what was broken off is done again
                entry.leave()
                raise

    # -- ways of generating -------------------------------------------------------------------------------------

    def _enter_generation(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Where a way of generating begins: refuse continuous batching, and let drafts wait for the prompt.

        Raises:
            SkipError: for continuous batching, whose worker would keep the error to itself.
        """
        if not self.enabled or plan_that_holds(self._root) is not self._pass:
            return call(*args, **kwargs)
        if name == BATCHING:
            raise SkipError(
                "sublayers are left out of this model, and continuous batching (generate_batch, "
                'cache_implementation="paged") runs many sequences as one row on a paged cache, of which no layer can '
                "be left out: use generate(), or remove the plan first"
            )
        generator = call(*args, **kwargs)
        if self.plan.phase != "both":
            prompt_alone(generator)
        return generator

    def in_phase(self, phase: Said) -> AbstractContextManager[None]:
        """Say what passes of several tokens on a filled cache are about, inside the block, in this thread or task.

        `generate` is asked, and needs nothing said. A loop of one's own reads a prompt in chunks, or verifies a draft,
        by the same calls: under a plan for one of the phases, they are refused until it is said which.

        Args:
            phase: `"prefill"` for chunks of a prompt, `"decode"` for tokens that are verified.

        Raises:
            SkipError: for another word.
        """
        return said(phase)

    # -- a sequence ---------------------------------------------------------------------------------------------

    @property
    def enabled(self) -> bool:
        """False runs the whole model for a while, on caches of its own: nothing is left out, marked or counted."""
        return self._pass.state.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._pass.state.enabled = bool(value)

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
        check_scale(bool(scales), self.map)
        if (mark := self._pass.state.last) is None or self._active is None:
            raise SkipError("extend() adds to a sequence that is running: call it after a pass with a KV cache")
        self.extend_in(mark, layers, scales)

    def extend_in(self, mark: kv.Mark, mlp: Iterable[int], mlp_scale: Mapping[int, float]) -> None:
        """Like `extend`, unchecked, in the sequence of a mark: with several threads the last pass can be another's."""
        for layer in mlp:
            if layer not in self.plan.mlp and layer not in mark.extra:
                self._extend_layers([layer])
                mark.extra[layer] = mlp_scale.get(layer)

    @property
    def extra(self) -> dict[int, float | None]:
        """Feed-forwards that `extend` left out in the sequence that ran last -> their factor (None: 1)."""
        return dict(self._pass.state.last.extra) if self._pass.state.last else {}

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
        with kv.hidden(cache, self._pass.state.hide, self.map.num_layers):
            self._pass.state.drafting += 1
            try:
                yield
            finally:
                self._pass.state.drafting -= 1


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A bound method that does not keep its object alive; when that is gone, nothing happens."""
    weak = WeakMethod(method)

    def call(*args: Any) -> Any:
        return None if (alive := weak()) is None else alive(*args)

    return call
