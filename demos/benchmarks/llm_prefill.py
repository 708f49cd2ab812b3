"""Prefill time against the share of sublayers that is left out, next to the limit that the remaining ones set.

    python -m demos.benchmarks.llm_prefill                     # 12 layers of width 1,024, 1,024 tokens; two minutes
    python -m demos.benchmarks.llm_prefill --preset h200       # Llama-3-8B shape in bfloat16 at 4k, 32k and 128k tokens

Random weights: time does not depend on them. All variants run in every round, and ratios are taken within a round. The
limit is 1 - (time of the left-out sublayers, each with its norm) / (time of the whole pass): embedding, head, residual
sums and everything between are in the pass and are not saved. The sublayers' times are measured in the same run, on
the whole model, before and after the rounds. The h200 preset has not been run by its authors: no GPU was at hand.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from demos.benchmarks.measure import Ratio, interleaved, keep_existing, machine, write_json, write_text
from skipguide.llm import SublayerPlan
from skipguide.llm.cost import SublayerCosts, measure_costs

OUT = Path(__file__).with_suffix(".json")
BAR = 0.05


@dataclass(frozen=True)
class Shape:
    """A Llama-like model and the prompts it reads."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    tokens: tuple[int, ...]
    dtype: torch.dtype
    vocabulary: int = 32000
    rounds: int = 8

    def build(self) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=self.ffn,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            max_position_embeddings=max(self.tokens), tie_word_embeddings=True,
        )  # fmt: skip
        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        with torch.device(device):
            return LlamaForCausalLM(config).to(self.dtype).eval()

    def flops(self, tokens: int) -> tuple[float, float]:
        """Matrix multiplications of one attention and one MLP over a prompt; causal attention counts half."""
        head = self.width // self.heads
        projections = 2 * tokens * self.width * head * (2 * self.heads + 2 * self.kv_heads)
        return projections + 2 * 2 * tokens**2 / 2 * self.width, 3 * 2.0 * tokens * self.width * self.ffn


PRESETS = {
    "cpu": Shape(12, 1024, 16, 4, 2816, (1024,), torch.float32),
    "quick": Shape(4, 256, 4, 2, 704, (256,), torch.float32, rounds=3),
    "h200": Shape(32, 4096, 32, 8, 14336, (4096, 32768, 131072), torch.bfloat16, vocabulary=128256, rounds=10),
}


def plans(layers: int) -> dict[str, SublayerPlan]:
    """What is left out, spread evenly: about 1/8, 1/4, 3/8 and 1/2 of all layers; attentions or MLPs alone."""

    def spread(count: int) -> tuple[int, ...]:
        # not the first, so that a sublayer is left out in the middle of work
        return tuple(sorted({round((i + 0.5) * layers / count) for i in range(count)} - {layers}))

    found = {}
    for count in sorted({max(1, round(layers * eighths / 8)) for eighths in (1, 2, 3, 4)}):
        some = spread(count)
        found[f"{count} whole layers"] = SublayerPlan(some, some)
    quarter = spread(layers // 4)
    found["attention alone"] = SublayerPlan(attn=quarter)
    found["MLP alone"] = SublayerPlan(mlp=quarter)
    scales = dict.fromkeys(quarter, 1.01)
    shifted = tuple((i + 1) % layers for i in quarter)
    found["in different layers, with scales"] = SublayerPlan(quarter, shifted, scales, dict.fromkeys(shifted, 1.01))
    return found


def share(plan: SublayerPlan, attn: float, mlp: float, layers: int, total: float | None = None) -> float:
    """What the plan's sublayers are of all (or of `total`)."""
    return (len(plan.attn) * attn + len(plan.mlp) * mlp) / (total or layers * (attn + mlp))


def measure(shape: Shape, tokens: int) -> dict[str, Any]:
    """All variants at one prompt length."""
    model = shape.build()
    ids = torch.randint(0, shape.vocabulary, (1, tokens), device=model.device)
    chosen = plans(shape.layers)
    variants: dict[str, Callable[[], AbstractContextManager[object]]] = {"all": nullcontext}
    variants |= {name: lambda plan=plan: plan.apply(model, cached=False) for name, plan in chosen.items()}

    def run() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False, logits_to_keep=1)

    run()
    costs = [measure_costs(model, tokens, repeats=3)]
    with tqdm(total=shape.rounds * len(variants), desc=f"{tokens} tokens") as bar:
        rounds = list(interleaved(variants, run, shape.rounds, lambda name: bar.update() and None))
    costs.append(measure_costs(model, tokens, repeats=3))
    best = SublayerCosts(
        tuple(map(min, costs[0].attn_ms, costs[1].attn_ms)), tuple(map(min, costs[0].mlp_ms, costs[1].mlp_ms)),
        min(cost.rest_ms for cost in costs), tokens,
    )  # fmt: skip
    attn, mlp = shape.flops(tokens)
    results = {}
    for name, plan in chosen.items():
        ratio = Ratio.of([r[name][0] for r in rounds], [r["all"][0] for r in rounds])
        limit = 1 - share(plan, best.attn_ms[0], best.mlp_ms[0], shape.layers, best.total_ms)
        results[name] = {
            "attn": len(plan.attn), "mlp": len(plan.mlp),
            "share_of_sublayers": round((len(plan.attn) + len(plan.mlp)) / (2 * shape.layers), 4),
            "share_of_flops": round(share(plan, attn, mlp, shape.layers), 4),
            "time": ratio.to_dict(), "limit": round(limit, 5),
            "speedup": round(1 / ratio.median, 4), "limit_speedup": round(1 / limit, 4),
            "over_limit": round(ratio.median / limit - 1, 4),
        }  # fmt: skip
    seconds = min(r["all"][0] for r in rounds)
    return {
        "tokens": tokens, "seconds": round(seconds, 4), "costs": best.to_dict() | {"rest_ms": best.rest_ms},
        "attention_share_of_sublayer_time": round(sum(best.attn_ms) / best.sublayers_ms, 4),
        "variants": results, "within_bar": all(v["over_limit"] <= BAR for v in results.values()),
    }  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    """The table for people."""
    lines = []
    for found in result["prompts"]:
        lines += [
            f"{result['shape']['layers']} layers of width {result['shape']['width']}, {found['tokens']} tokens, "
            f"{found['seconds']:.2f} s for the whole model:",
            "",
            "| left out | sublayers | time of the whole | limit | speed-up | limit | over the limit |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, v in found["variants"].items():
            lines.append(
                f"| {name} | {v['attn']} + {v['mlp']} | {v['time']['median']:.3f} | {v['limit']:.3f} | "
                f"{v['speedup']:.2f}x | {v['limit_speedup']:.2f}x | {v['over_limit']:+.1%} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own)")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--force", action="store_true", help="replace existing results")
    args = parser.parse_args()
    keep_existing(args.out, args.force)
    if args.threads:
        torch.set_num_threads(args.threads)
    shape = PRESETS[args.preset]
    result = {
        "machine": machine(),
        "shape": {k: str(v) if isinstance(v, torch.dtype) else v for k, v in vars(shape).items()},
        "bar": BAR,
        "prompts": [measure(shape, tokens) for tokens in shape.tokens],
    }
    write_json(args.out, result)
    write_text(args.out.with_suffix(".md"), markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
