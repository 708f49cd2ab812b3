"""Drafter: which sublayers a drafter leaves out, from how little each changes the stream and what each costs."""

from __future__ import annotations

import contextvars
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipguide.errors import SkipError
from skipguide.llm.applied import AppliedSublayers
from skipguide.llm.choose import least_per_millisecond
from skipguide.llm.cost import SublayerCosts, _Clock
from skipguide.llm.find import sublayer_map
from skipguide.llm.plan import SublayerPlan
from skipguide.llm.similarity import RequestMeter, SublayerStats
from skipguide.llm.sublayers import SublayerMap
from skipguide.llm.watch import watch


def choose_drafter(
    stats: SublayerStats, costs: SublayerCosts, share: float, keep_attn: Iterable[int] = ()
) -> SublayerPlan:
    """Leave out what changes the stream least per millisecond saved, until `share` of the sublayers' time is saved.

    One attention always stays, because the lengths of the cache are read from it: if all were chosen, the one that
    does most runs.

    Args:
        stats: similarity of every sublayer.
        costs: time of every sublayer at decoding.
        share: of the sublayers' time, above 0 and below 1.
        keep_attn: layers whose attention must run, as later layers read its keys and values.

    Raises:
        SkipError: for statistics and costs of different models, or where nothing is left to leave out.

    Example:
        >>> stats = SublayerStats((0.9, 0.99), (0.5, 0.98), (1.0, 1.0), (1.0, 1.0))
        >>> plan = choose_drafter(stats, SublayerCosts((1.0, 1.0), (2.0, 2.0), 1.0, tokens=64), share=0.5)
        >>> plan.attn, plan.mlp
        ((1,), (1,))
    """
    if len(costs.attn_ms) != stats.num_layers:
        raise SkipError(f"the statistics are of {stats.num_layers} layers, the costs of {len(costs.attn_ms)}")
    kept = set(keep_attn)
    similarity = [-1.0 if layer in kept else value for layer, value in enumerate(stats.attn_similarity)]
    found = least_per_millisecond(similarity, stats.mlp_similarity, costs.attn_ms, costs.mlp_ms, share=share)
    attn = set(found.attn) - kept  # where nearly everything was chosen, so were these
    if len(attn) == stats.num_layers:
        attn.discard(min(attn, key=lambda layer: stats.attn_similarity[layer]))
    if not attn and not found.mlp:
        raise SkipError("the drafter would leave nothing out: ask for a larger share of the time")
    return SublayerPlan(tuple(attn), found.mlp)


def expected_cost(plan: SublayerPlan, costs: SublayerCosts | None, sublayers: SublayerMap) -> float:
    """Of drafting a token, in plain steps: the share of the sublayers' time that stays, and a tenth for the rest."""
    if costs is None:
        saved = (len(plan.attn) + len(plan.mlp)) / len(sublayers.sites)
    else:
        saved = sum(costs.attn_ms[i] for i in plan.attn) + sum(costs.mlp_ms[i] for i in plan.mlp)
        saved /= costs.sublayers_ms
    return 1 - 0.9 * saved


@dataclass
class PromptMeter:
    """Similarities of one prompt, measured in its own prefill.

    Args:
        model: a causal language model of a known family.
    """

    model: Any
    meter: RequestMeter | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure the passes inside the block; nothing waits for the device."""

        def enter(layer: int, part: Any, before: Tensor, after: Tensor) -> None:
            meter.add(layer, part, before, after, watching.now.mask if watching.now is not None else None)

        watching = watch(self.model, enter)
        self.meter = meter = RequestMeter(watching.map.num_layers)
        with watching:
            yield

    def stats(self) -> SublayerStats:
        """The similarities, averaged over the rows; one copy to the host.

        Raises:
            SkipError: if the prefill produced NaN or inf.
        """
        assert self.meter is not None
        real = self.meter.tokens > 0  # a row of nothing but padding says nothing
        both = torch.stack([self.meter.similarity(part) for part in ("attn", "mlp")])
        values = (torch.where(real, both, 0.0).sum(2) / real.sum()).double().cpu().tolist()
        ones = (1.0,) * self.meter.num_layers
        return SublayerStats(tuple(values[0]), tuple(values[1]), ones, ones, model=type(self.model).__name__)


class StepClock:
    """Times every sublayer of the decoding steps inside its `with`, and says what they cost.

    Args:
        sublayers: the model's sublayers.
        device: where it runs.
    """

    def __init__(self, sublayers: SublayerMap, device: torch.device) -> None:
        self.sublayers = sublayers
        self.device = device
        self._clocks = {(site.layer, site.part): _Clock(device) for site in sublayers.sites}
        self._stack = ExitStack()

    def __enter__(self) -> StepClock:
        """Hook the sublayers and their norms."""
        for site in self.sublayers.sites:
            for module in (site.module, *site.helper_modules):
                self._stack.enter_context(self._clocks[site.layer, site.part].on(module))
        return self

    def __exit__(self, *exc: object) -> None:
        """Take the hooks away."""
        self._stack.close()

    def costs(self, tokens: int) -> SublayerCosts:
        """What was measured, as the median over the layers.

        Args:
            tokens: length of the context.
        """
        read = {key: clock.read() for key, clock in self._clocks.items()}
        layers = self.sublayers.num_layers
        ms = [max(1e-6, statistics.median(read.get((i, part), 0.0) for i in range(layers))) for part in ("attn", "mlp")]
        return SublayerCosts((ms[0],) * layers, (ms[1],) * layers, 0.0, tokens, "decode", str(self.device))


class SelfDrafter:
    """The model as its own drafter. Outside `drafting` the model is whole; at `rest`, it does not even have gates."""

    def __init__(self, plans: Sequence[SublayerPlan], model: Any) -> None:
        self.plans = plans
        self.model = model
        self._applied: AppliedSublayers | None = None
        self._number = 0

    @contextmanager
    def drafting(self, cache: Any, number: int) -> Iterator[None]:
        """Leave out what plan `number` says."""
        if number != self._number:
            self.rest()
        if self._applied is None:
            self._number = number
            # in a context of its own, so that out here no plan is active and a closed gate costs next to nothing
            self._applied = contextvars.copy_context().run(self._apply)
        with self._applied.running(), self._applied.drafting(cache):
            yield

    def _apply(self) -> AppliedSublayers:
        return AppliedSublayers(self.plans[self._number], sublayer_map(self.model), drafter=True)

    def rest(self) -> None:
        """Take the gates away until the next draft."""
        if self._applied is not None:
            self._applied.remove()
            self._applied = None

    def __enter__(self) -> SelfDrafter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.rest()
