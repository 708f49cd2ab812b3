"""What leaving sublayers out costs in quality: perplexity and top-1 agreement on held-out text of the bundled model.

Sets are chosen on training files (20 windows of text) and judged on files that were never trained on. Every method runs
with and without the compensating scales. Baselines see the same statistics.

    python -m demos.benchmarks.llm_quality            # about ten minutes on one core
    python -m demos.benchmarks.llm_quality --report   # the figure and the table again, from the JSON
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM

from demos.benchmarks.llm_quality_report import report
from demos.benchmarks.measure import keep_existing, machine, write_json
from demos.bundled_lm.evaluate import held_out_texts, windows
from demos.bundled_lm.text import files, held_out
from skipguide.assets import bundled
from skipguide.hosts.kv_cache import as_argument
from skipguide.llm import AdaSkip, SublayerPlan, SublayerStats
from skipguide.llm.choose import (
    Sublayers,
    late_layers,
    least_influential,
    least_per_millisecond,
    most_similar,
    random_sublayers,
)
from skipguide.llm.cost import SublayerCosts, measure_costs
from skipguide.llm.unified import unified_layers

OUT = Path(__file__).with_suffix(".json")
LENGTH, SEEDS = 512, 5
COUNTS = (2, 4, 6, 8, 10, 12)


@dataclass(frozen=True)
class Variant:
    """One set of sublayers by one method."""

    method: str
    chosen: Sublayers
    compensate: bool
    seed: int | None = None

    def plan(self, stats: SublayerStats, phase: str = "both") -> SublayerPlan:
        attn, mlp = self.chosen.attn, self.chosen.mlp
        scales = {}
        if self.compensate:
            scales = {
                "attn_scale": {i: stats.attn_scale[i] for i in attn},
                "mlp_scale": {i: stats.mlp_scale[i] for i in mlp},
            }
        return SublayerPlan(attn, mlp, phase=phase, **scales)


def sets(
    stats: SublayerStats,
    costs: SublayerCosts,
    damage: list[float],
    counts: tuple[int, ...] = COUNTS,
    seeds: int = SEEDS,
) -> Iterator[tuple[str, Sublayers, int | None]]:
    """Every method's sets: method, sublayers, seed."""
    layers = stats.num_layers
    similar = (stats.attn_similarity, stats.mlp_similarity)
    for count in counts:
        yield "AdaSkip", most_similar(*similar, count), None
        if count < layers:
            yield "AdaSkip, attention", most_similar(*similar, count, part="attn"), None
        yield "AdaSkip, MLP", most_similar(*similar, count, part="mlp"), None
        share = count / (2 * layers)
        yield (
            "AdaSkip, cost-aware",
            least_per_millisecond(*similar, costs.attn_ms, costs.mlp_ms, share=share),
            None,
        )
        order = sorted(range(2 * layers), key=lambda n: damage[n])
        yield "measured damage", Sublayers.numbered(order[:count], layers), None
        if count < layers:
            yield "late attention", Sublayers(attn=tuple(range(layers - count, layers))), None
        for seed in range(seeds):
            yield "random sublayers", random_sublayers(layers, count, seed), seed
            # a fairer control: as random, but the first and the last layer stay
            inner = random_sublayers(layers - 2, count, seed)
            kept_ends = Sublayers(tuple(i + 1 for i in inner.attn), tuple(i + 1 for i in inner.mlp))
            yield "random, ends kept", kept_ends, seed
        if count % 2 == 0:
            yield "late layers", late_layers(layers, count // 2), None
            yield "block influence", least_influential(stats.block_similarity, count // 2), None
            for mode in ("balanced", "reference"):
                kept = unified_layers(layers, layers / (layers - count // 2), mode=mode)
                yield f"Unified, {mode}", Sublayers.layers(set(range(layers)) - set(kept)), None


@torch.no_grad()
def judge(
    model: LlamaForCausalLM, batches: list[Tensor], best: list[Tensor] | None
) -> tuple[list[float], list[Tensor]]:
    """Loss of every window in nats per token, and the most likely tokens."""
    losses, tops = [], []
    for ids in batches:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        losses += loss.mean(1).tolist()
        tops.append(logits.argmax(-1))
    return losses, tops


@torch.no_grad()
def judge_decoding(model: LlamaForCausalLM, rows: list[Tensor], prompt: int) -> tuple[list[float], list[Tensor]]:
    """The same in token-by-token passes over the text after a prompt, one request at a time."""
    losses, tops = [], []
    for ids in rows:
        cache = as_argument(model, DynamicCache())
        model(input_ids=ids[None, :prompt], logits_to_keep=1, **cache)
        steps = ids[None, prompt:-1].split(1, dim=1)
        scores = torch.cat([model(input_ids=one, **cache).logits[:, -1] for one in steps]).float()
        losses.append(torch.nn.functional.cross_entropy(scores, ids[prompt + 1 :]).item())
        tops.append(scores.argmax(-1))
    return losses, tops


def row(
    losses: list[float], tops: list[Tensor], full: tuple[list[float], list[Tensor]], **about: Any
) -> dict[str, Any]:
    """What one measurement says, next to the full model."""
    same = torch.cat([a.flatten() == b.flatten() for a, b in zip(tops, full[1], strict=True)])
    rise = [a - b for a, b in zip(losses, full[0], strict=True)]
    return about | {
        "perplexity": round(math.exp(statistics.mean(losses)), 4),
        "loss_rise": round(statistics.mean(rise), 5),
        "loss_rise_se": round(statistics.stdev(rise) / len(rise) ** 0.5, 5),
        "agreement": round(same.float().mean().item(), 5),
    }


def measured_damage(model: LlamaForCausalLM, batches: list[Tensor], layers: int) -> list[float]:
    """The rise of the loss on calibration text when each sublayer alone is left out: what similarity stands for."""
    base = statistics.mean(judge(model, batches, None)[0])
    found = []
    for number in range(2 * layers):
        one = Sublayers.numbered([number], layers)
        with SublayerPlan(one.attn, one.mlp).apply(model, cached=False):
            found.append(statistics.mean(judge(model, batches, None)[0]) - base)
    return found


def prefill_rows(
    model: LlamaForCausalLM, batches: list[Tensor], stats: SublayerStats, costs: SublayerCosts, damage: list[float]
) -> Iterator[dict[str, Any]]:
    """Every method at every count, over whole texts."""
    full = judge(model, batches, None)
    yield row(*full, full, method="full model", count=0, time_share=0.0, compensate=False, seed=None, attn=[], mlp=[])
    for method, chosen, seed in tqdm(list(sets(stats, costs, damage)), desc="sets"):
        time = sum(costs.attn_ms[i] for i in chosen.attn) + sum(costs.mlp_ms[i] for i in chosen.mlp)
        for compensate in (False, True):
            plan = Variant(method, chosen, compensate, seed).plan(stats)
            with plan.apply(model, cached=False):
                found = judge(model, batches, None)
            about = {"method": method, "count": chosen.count, "time_share": round(time / costs.sublayers_ms, 4)}
            yield row(
                *found, full, **about, compensate=compensate, seed=seed, attn=list(chosen.attn), mlp=list(chosen.mlp)
            )


def decode_rows(
    model: LlamaForCausalLM, rows: list[Tensor], stats: SublayerStats, prompt: int
) -> Iterator[dict[str, Any]]:
    """Decoding with the prompt read whole: AdaSkip with and without its online stage, Unified, random sublayers."""
    layers = stats.num_layers
    full = judge_decoding(model, rows, prompt)
    yield row(*full, full, method="full model", count=0, skipped=0.0, seed=None)
    jobs: list[tuple[str, int, int | None, Callable[[], Any]]] = []
    for count in (2, 4, 6, 8):
        for online in (False, True):
            settings = AdaSkip(count=count, phase="decode", online=online)
            name = "AdaSkip, online" if online else "AdaSkip"
            jobs.append((name, count, None, lambda s=settings: s.apply(model, stats)))
        kept = unified_layers(layers, layers / (layers - count // 2))
        plan = Variant("", Sublayers.layers(set(range(layers)) - set(kept)), False).plan(stats, "decode")
        jobs.append(("Unified, balanced", count, None, lambda p=plan: p.apply(model)))
        for seed in range(3):
            plan = Variant("", random_sublayers(layers, count, seed), True).plan(stats, "decode")
            jobs.append(("random sublayers", count, seed, lambda p=plan: p.apply(model)))
    for method, count, seed, apply in tqdm(jobs, desc="decoding"):
        with apply() as applied:
            found = judge_decoding(model, rows, prompt)
            passes = applied.stats.passes - len(rows)
            skipped = sum(applied.stats.skips.values()) / (2 * layers * passes)
        yield row(*found, full, method=method, count=count, skipped=round(skipped, 4), seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="folder of a checkpoint; default: the bundled one")
    parser.add_argument("--windows", type=int, default=16, help="held-out windows of 512 tokens (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--force", action="store_true", help="replace existing results")
    parser.add_argument("--report", action="store_true", help="only draw the figure and write the table from the JSON")
    args = parser.parse_args()
    if args.report:
        report(args.out)
        return
    keep_existing(args.out, args.force)
    torch.set_num_threads(1)
    folder = args.model or bundled("tiny-lm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def whole(texts: list[str], count: int) -> Tensor:
        """The first `count` full windows, taken evenly over the texts."""
        found = [piece for piece in windows(tokenizer, texts, LENGTH) if len(piece) == LENGTH]
        picked = torch.linspace(0, len(found) - 1, min(count, len(found))).round().long().tolist()
        return torch.stack([found[i] for i in picked])

    test = whole([text for _, text in held_out_texts()], args.windows)
    seen = [text for name, text in files() if not held_out(name)]
    calibration = whole(seen[:: max(1, len(seen) // 60)], 20)
    stats = AdaSkip.calibrate(model, list(calibration))
    other = AdaSkip.calibrate(model, list(whole(seen[7 :: max(1, len(seen) // 60)], 20)))
    costs = measure_costs(model, LENGTH, repeats=9)
    damage = measured_damage(model, list(calibration[::2].split(5)), stats.num_layers)
    batches = list(test.split(4))
    result = {
        "machine": machine(),
        "model": {"layers": stats.num_layers, "parameters": sum(p.numel() for p in model.parameters())},
        "text": {"held_out_windows": len(test), "tokens": LENGTH, "calibration_windows": len(calibration)},
        "stats": stats.to_dict(),
        "ranking_of_other_text": other.ranking(),
        "costs": costs.to_dict(),
        "measured_damage": damage,
        "prefill": list(prefill_rows(model, batches, stats, costs, damage)),
        "decode": list(decode_rows(model, [ids[:352] for ids in test[::2]], stats, 256)),
    }
    write_json(args.out, result)
    report(args.out)


if __name__ == "__main__":
    main()
