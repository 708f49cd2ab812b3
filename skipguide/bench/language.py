"""What leaving sublayers out costs a language model on a text: every way to choose them, with its controls.

Sets are chosen on one half of the text and judged on the other. Pairs are over the pieces of the other half.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipguide.bench.intervals import Interval
from skipguide.errors import SkipError
from skipguide.llm import SkipOrder, SublayerPlan, SublayerStats
from skipguide.llm.choose import Sublayers, late_layers, least_influential, most_similar, random_sublayers
from skipguide.llm.unified import unified_layers

SHARES, QUICK_SHARES = (1 / 30, 1 / 15, 2 / 15, 7 / 30, 11 / 30), (1 / 15, 2 / 15, 7 / 30)
SEEDS = 3
WHOLE = "whole model"


@dataclass(frozen=True)
class Facts:
    """What sets are chosen by.

    Attributes:
        stats: similarities and scales, of `AdaSkip.calibrate`.
        order: what the search of `MeasuredSkip` found; None where it was not made.
    """

    stats: SublayerStats
    order: SkipOrder | None = None


@dataclass(frozen=True)
class Method:
    """One way to choose sublayers.

    Attributes:
        name: of its row.
        note: in words.
        choose: facts, how many sublayers, and a seed to the set; None where it has no set of that size.
        scaled: the stream is scaled where a sublayer is left out.
        seeds: how many sets it draws.
        searched: it needs the search of `MeasuredSkip`, which takes minutes.
    """

    name: str
    note: str
    choose: Callable[[Facts, int, int], Sublayers | None]
    scaled: bool = False
    seeds: int = 1
    searched: bool = False


def _adaskip(facts: Facts, count: int, seed: int) -> Sublayers | None:
    return most_similar(facts.stats.attn_similarity, facts.stats.mlp_similarity, count)


def _attention(facts: Facts, count: int, seed: int) -> Sublayers | None:
    stats = facts.stats
    if count >= stats.num_layers:
        return None
    return most_similar(stats.attn_similarity, stats.mlp_similarity, count, part="attn")


def _search(facts: Facts, count: int, seed: int) -> Sublayers | None:
    return facts.order.first(count) if facts.order is not None and count <= len(facts.order.order) else None


def _alone(facts: Facts, count: int, seed: int) -> Sublayers | None:
    if facts.order is None:
        return None
    known = [(loss, number) for number, loss in enumerate(facts.order.alone) if loss is not None]
    chosen = [number for _, number in sorted(known)[:count]]
    return Sublayers.numbered(chosen, facts.stats.num_layers) if len(chosen) == count else None


def _influence(facts: Facts, count: int, seed: int) -> Sublayers | None:
    known = facts.stats.block_similarity
    return least_influential(known, count // 2) if known and count % 2 == 0 else None


def _unified(mode: str) -> Callable[[Facts, int, int], Sublayers | None]:
    def choose(facts: Facts, count: int, seed: int) -> Sublayers | None:
        layers = facts.stats.num_layers
        if count % 2 or count // 2 >= layers - 1:
            return None
        try:
            kept = unified_layers(layers, layers / (layers - count // 2), mode=mode)
        except SkipError:  # the published rule divides by zero at some sizes
            return None
        return Sublayers.layers(set(range(layers)) - set(kept))

    return choose


def _late(facts: Facts, count: int, seed: int) -> Sublayers | None:
    return late_layers(facts.stats.num_layers, count // 2) if count % 2 == 0 else None


def _random(facts: Facts, count: int, seed: int) -> Sublayers | None:
    """As random, but the first and the last layer stay: a fairer control."""
    inner = facts.stats.num_layers - 2
    if count > 2 * inner:
        return None
    found = random_sublayers(inner, count, seed)
    return Sublayers(tuple(i + 1 for i in found.attn), tuple(i + 1 for i in found.mlp))


METHODS: tuple[Method, ...] = (
    Method("AdaSkip, scaled", "the most similar sublayers, with AdaSkip's factors", _adaskip, scaled=True),
    Method("AdaSkip", "the most similar sublayers, without factors", _adaskip),
    Method("attention only, scaled", "the most similar attentions, with factors", _attention, scaled=True),
    Method(
        "MeasuredSkip", "one after the other, always the one with which the loss rises least", _search, searched=True
    ),
    Method("damage alone", "those that each cost least when they alone are left out", _alone, searched=True),
    Method("block influence", "the whole layers of least block influence (ShortGPT)", _influence),
    Method("Unified, balanced", "whole layers evenly; meant for models that are fine-tuned so", _unified("balanced")),
    Method("Unified, reference", "the published rule of Unified Layer Skipping", _unified("reference")),
    Method("late layers", "the last whole layers, as an early exit", _late),
    Method("random, ends kept", f"control: random sublayers of the inner layers, {SEEDS} draws", _random, seeds=SEEDS),
)


def counts_of(layers: int, shares: Sequence[float] = SHARES) -> tuple[int, ...]:
    """Even numbers of sublayers to leave out, so that methods of whole layers can join in.

    Example:
        >>> counts_of(30), counts_of(12, (1 / 15, 0.25))
        ((2, 4, 8, 14, 22), (2, 6))
    """
    return tuple(dict.fromkeys(max(2, 2 * round(share * layers)) for share in shares))


@torch.no_grad()
def judge(model: Any, pieces: Sequence[Tensor]) -> tuple[list[float], list[Tensor]]:
    """Loss of every piece [1, T] in nats per token, and the most probable tokens.

    Raises:
        SkipError: for losses that are not finite.
    """
    losses, tops = [], []
    for ids in pieces:
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        losses.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])))
        tops.append(logits.argmax(-1))
    if not all(math.isfinite(loss) for loss in losses):
        raise SkipError("the loss is not finite: run the model in float32 or bfloat16")
    return losses, tops


def plans(method: Method, facts: Facts, count: int) -> Iterator[SublayerPlan]:
    """The method's sets of that size."""
    for seed in range(method.seeds):
        chosen = method.choose(facts, count, seed)
        if chosen is None:
            continue
        scales: dict[str, Any] = {}
        if method.scaled:
            scales = {
                "attn_scale": {layer: facts.stats.attn_scale[layer] for layer in chosen.attn},
                "mlp_scale": {layer: facts.stats.mlp_scale[layer] for layer in chosen.mlp},
            }
        yield SublayerPlan(chosen.attn, chosen.mlp, **scales)


def measure(
    model: Any,
    pieces: Sequence[Tensor],
    whole: tuple[list[float], list[Tensor]],
    method: Method,
    facts: Facts,
    count: int,
) -> dict[str, Any]:
    """The losses of every piece with a method's sets left out, as plain data; or why there are none.

    Args:
        model: a causal language model.
        pieces: of the text.
        whole: what `judge` says of them with nothing left out.
        method: how the sets are chosen.
        facts: from what.
        count: how many sublayers.

    Returns:
        `losses` (per piece, the mean over the method's draws), `agreement` (share of the most probable tokens that
        are the whole model's), `left_out`; or `refused`.
    """
    drawn: list[list[float]] = []
    same: list[float] = []
    sets: list[dict[str, Any]] = []
    try:
        for plan in plans(method, facts, count):
            with plan.apply(model, cached=False):
                losses, tops = judge(model, pieces)
            drawn.append(losses)
            same.append(float(torch.cat([a == b for a, b in zip(tops, whole[1], strict=True)]).float().mean()))
            sets.append({"attn": list(plan.attn), "mlp": list(plan.mlp)})
    except SkipError as error:
        return {"refused": str(error)}
    if not drawn:
        return {"refused": f"has no set of {count} sublayers on this model"}
    means = [statistics.fmean(losses) for losses in zip(*drawn, strict=True)]
    return {"losses": means, "agreement": statistics.fmean(same), "left_out": sets}


def rise(losses: Sequence[float], whole: Sequence[float]) -> Interval:
    """Rise of the loss over the whole model's, in nats per token, with its interval over the pieces."""
    return Interval.of([a - b for a, b in zip(losses, whole, strict=True)])
