"""Damage: what leaving sublayers out of a language model does to its loss, and a search for those that do least."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from skipguide.config import as_whole
from skipguide.errors import SkipError
from skipguide.hosts.accelerate import execution_device
from skipguide.hosts.progress import progress_bar
from skipguide.llm.batch import Batch, check_batches, ids_and_mask, vocabulary_of
from skipguide.llm.choose import Sublayers, check_count
from skipguide.llm.elsewhere import refuse_skipping
from skipguide.llm.find import sublayer_map
from skipguide.llm.passes import evaluating
from skipguide.llm.plan import SublayerPlan
from skipguide.llm.plan_checks import check_plan
from skipguide.llm.skip_order import SkipOrder
from skipguide.prefix import Prefix
from skipguide.skipper import capture, resume

TIE = 1e-9  # nats


def search(model: nn.Module, batches: Iterable[Batch], most: int | None = None) -> SkipOrder:
    """Leave sublayers out one after the other, always the one that costs least; see `MeasuredSkip.calibrate`."""
    began = time.perf_counter()
    found = sublayer_map(model)
    refuse_skipping(found)
    trial = _Trials(model, batches)
    can = [n for n in range(2 * found.num_layers) if _can_go(n, found)]
    most = max(1, len(can) // 2) if most is None else as_whole("most", most)
    check_count(most, len(can))
    order: list[int] = []
    losses: list[float] = []
    with evaluating(model):
        whole = trial.start(order)
        # what each did to the loss when it was last measured, and beside how many others that was
        known = {n: (trial.loss(order, n), 0) for n in progress_bar(can, "each sublayer alone")}
        alone = {n: loss for n, (loss, _) in known.items()}
        bar = progress_bar(what="leaving out", total=most)
        while len(order) < most:
            # Damage mostly grows with what is left out: a sublayer that was worse before is not tried again.
            best = min(known, key=lambda n: (known[n][0], n))
            loss, beside = known[best]
            if beside < len(order):
                known[best] = (trial.loss(order, best), len(order))
                continue
            order.append(best)
            losses.append(loss)
            rise = loss - (losses[-2] if losses[1:] else whole)
            del known[best]
            if len(order) < most:
                trial.start(order)
                # the loss of all sets grew by this one's share, which a bound from before does not have
                known = {n: (before + rise, beside) for n, (before, beside) in known.items()}
            bar.update()
        bar.close()
    return SkipOrder(
        tuple(order), tuple(losses), whole, found.num_layers, trial.tokens, trial.count,
        round(time.perf_counter() - began, 3), type(found.model).__name__,
        tuple(alone.get(n) for n in range(2 * found.num_layers)),
    )  # fmt: skip


def _can_go(number: int, found: Any) -> bool:
    """Whether a model runs without this sublayer alone."""
    one = Sublayers.numbered([number], found.num_layers)
    try:
        check_plan(SublayerPlan(one.attn, one.mlp), found, cached=False)
    except SkipError:
        return False
    return True


class _Trials:
    """Losses of the texts with sets of sublayers left out; a trial runs from the layer on in which it differs."""

    def __init__(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        check_batches(batches)
        self.model = model
        self.layers = sublayer_map(model).num_layers
        device, vocabulary = execution_device(model), vocabulary_of(model)
        self.batches: list[tuple[Tensor, Tensor | None]] = []
        for number, batch in enumerate(batches):
            ids, mask = ids_and_mask(batch, number, vocabulary)
            self.batches.append((ids.to(device), None if mask is None else mask.to(device)))
        self.tokens = sum(int(_judged(*batch).sum()) for batch in self.batches)
        if not self.tokens:
            raise SkipError("nothing can be measured: give at least one batch of two tokens or more, not padding")
        self.count = 0
        self.resumes: bool | None = None
        self.prefixes: list[list[Prefix]] = [[] for _ in self.batches]

    def start(self, order: list[int]) -> float:
        """The loss with these left out; keeps what enters every layer, for the trials that follow."""
        self.count += 1
        with self._plan(order).apply(self.model, cached=False):
            if self.resumes is None:
                self.resumes = self._resumable()
            total = 0.0
            for number, batch in enumerate(self.batches):
                own = [Prefix(layer) for layer in range(self.layers)] if self.resumes else []
                with ExitStack() as all_layers:
                    for prefix in own:
                        all_layers.enter_context(capture(self.model, prefix))
                    total += self._sum(*batch)
                self.prefixes[number] = own
        return total / self.tokens

    def loss(self, order: list[int], more: int) -> float:
        """The loss with one more sublayer left out."""
        self.count += 1
        total = 0.0
        with self._plan([*order, more]).apply(self.model, cached=False):
            for number, batch in enumerate(self.batches):
                with ExitStack() as resumed:
                    if self.resumes:
                        resumed.enter_context(resume(self.model, self.prefixes[number][more % self.layers]))
                    total += self._sum(*batch)
        return total / self.tokens

    def _resumable(self) -> bool:
        """Whether this model, resumed in the middle and at the end, gives what it gives from the start."""
        prefixes = [Prefix(layer) for layer in {self.layers // 2, self.layers - 1}]
        try:
            with ExitStack() as both:
                for prefix in prefixes:
                    both.enter_context(capture(self.model, prefix))
                whole = self._sum(*self.batches[0])
            for prefix in prefixes:
                with resume(self.model, prefix):
                    if abs(self._sum(*self.batches[0]) - whole) > TIE * max(1.0, abs(whole)):
                        return False
        except (SkipError, LookupError):  # layers that are no blocks, or that read what earlier ones have left
            return False
        return True

    def _plan(self, numbers: list[int]) -> SublayerPlan:
        chosen = Sublayers.numbered(numbers, self.layers)
        return SublayerPlan(chosen.attn, chosen.mlp)

    def _sum(self, ids: Tensor, mask: Tensor | None) -> float:
        """The sum of the losses of all tokens that are judged, in nats."""
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        total = float(torch.where(_judged(ids, mask), each, 0.0).sum())
        if not total < float("inf"):
            raise SkipError("the loss is NaN or infinite: run the model in float32 or bfloat16")
        return total


def _judged(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Where a token is predicted from a token: [B, T - 1]."""
    if mask is None:
        return torch.ones_like(ids[:, 1:], dtype=torch.bool)
    return mask[:, 1:].bool() & mask[:, :-1].bool()
