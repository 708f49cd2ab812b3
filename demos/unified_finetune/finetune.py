"""Unified Layer Skipping's fine-tuning: the prompt through all layers, the rest through those that stay.

    accelerate launch -m demos.unified_finetune.finetune --speedup 2 --out /tmp/unified-lm
    python -m demos.unified_finetune.finetune --quick --out /tmp/unified-lm        # a minute, to see that it runs

Each window of text is cut in two. The first half is read by the whole model and leaves its keys and values; the second
goes through the retained layers alone, on those keys and values, and only its tokens are predicted: what decoding with
`UnifiedSkip(speedup, phase="decode")` does later. Embeddings stay frozen. Source: arXiv 2404.06954 (its models are of 7
billion parameters, two epochs of instructions at a learning rate of 2e-5; here the bundled model and its own kind of
text, and a learning rate for that size).

Before and after, perplexity on held-out files: with layers left out (balanced, as trained) and of the whole model.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM

from demos.benchmarks.measure import keep_existing, machine, write_json
from demos.bundled_lm.text import encode, files, held_out
from skipguide.assets import bundled
from skipguide.hosts.kv_cache import as_argument
from skipguide.llm import AppliedSublayers, UnifiedSkip

HERE = Path(__file__).parent


def loss_of(model: Any, applied: AppliedSublayers | None, window: Tensor, prompt: int) -> Tensor:
    """Mean cross-entropy of the tokens after the prompt.

    Args:
        model: the model.
        applied: the layers that are left out after the prompt, switched off outside drafting; None leaves out nothing.
        window: [B, T] token ids.
        prompt: how many of them all layers read.
    """
    if applied is None:
        logits = model(input_ids=window[:, :-1], use_cache=False).logits[:, prompt:]
    else:
        cache = DynamicCache(config=model.config)
        given = as_argument(model, cache)
        model(input_ids=window[:, :prompt], use_cache=True, logits_to_keep=1, **given)
        with applied.drafting(cache):  # a pass of many tokens that is meant as decoding
            logits = model(input_ids=window[:, prompt:-1], use_cache=True, **given).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), window[:, prompt + 1 :].flatten())


@torch.no_grad()
def perplexity(model: Any, applied: AppliedSublayers | None, windows: Tensor, prompt: int) -> float:
    """Of the tokens after the prompt, over all windows [N, T]."""
    losses = [loss_of(model, applied, batch, prompt).item() for batch in windows.split(16)]
    weights = [len(batch) for batch in windows.split(16)]
    return math.exp(float(np.average(losses, weights=weights)))


def perplexities(model: Any, skip: UnifiedSkip, windows: Tensor, prompt: int) -> dict[str, float]:
    """Of the whole model, and with the layers left out."""
    model.eval()
    found = {"whole": perplexity(model, None, windows, prompt)}
    with skip.apply(model) as applied:
        applied.enabled = False
        found["skipped"] = perplexity(model, applied, windows, prompt)
    return {name: round(value, 4) for name, value in found.items()}


def batches(stream: NDArray[Any], rows: int, length: int, seed: int) -> Iterator[Tensor]:
    """Random windows [rows, length] of a stream of token ids, without end."""
    random = np.random.default_rng(seed)
    while True:
        starts = random.integers(0, len(stream) - length, rows)
        yield torch.from_numpy(np.stack([stream[s : s + length] for s in starts]).astype(np.int64))


def main() -> None:
    """Fine-tune, compare, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder (default: the bundled model)")
    parser.add_argument("--speedup", type=float, default=2.0)
    parser.add_argument("--mode", choices=("balanced", "reference"), default="balanced")
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window; the first half is the prompt")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", type=int, default=96, help="windows to judge on")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, required=True, help="folder for the fine-tuned model")
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    keep_existing(args.results, args.force)
    keep_existing(args.out, args.force)
    if args.quick:
        args.steps, args.held_out = 10, 16
    set_seed(args.seed)
    accelerator = Accelerator()
    folder = args.model or bundled("tiny-lm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = {kept: [text for name, text in files() if held_out(name) is kept] for kept in (False, True)}
    train, test = (encode(tokenizer, texts[kept]) for kept in (False, True))
    prompt = args.length // 2
    rows = min(args.held_out, len(test) // args.length)
    judged = torch.from_numpy(test[: rows * args.length].astype(np.int64)).view(rows, args.length)
    judged = judged.to(accelerator.device)
    skip = UnifiedSkip(args.speedup, args.mode, phase="decode")

    model.get_input_embeddings().requires_grad_(False)  # the head too, where it is tied
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    before = perplexities(model, skip, judged, prompt)
    accelerator.print(f"before: {before}")

    train_steps(args, accelerator, model, optimizer, skip, batches(train, args.rows, args.length, args.seed))
    after = perplexities(model, skip, judged, prompt)
    accelerator.print(f"after {args.steps} steps: {after}")
    if not accelerator.is_main_process:
        return
    accelerator.unwrap_model(model).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    layers = model.config.num_hidden_layers
    write_json(
        args.results,
        {
            "layers": skip.layers(layers),
            "realised_speedup_of_the_layers": skip.realised_speedup(layers),
            "perplexity_before": before,
            "perplexity_after": after,
            "held_out_windows": rows,
            "predicted_tokens": rows * (args.length - prompt - 1),
            "arguments": {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()},
            "machine": machine(),
        },
    )


def train_steps(
    args: argparse.Namespace,
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    skip: UnifiedSkip,
    windows: Iterator[Tensor],
) -> None:
    """Train: a short warm-up, a constant rate, then linearly down to 0."""
    model.train()
    with skip.apply(accelerator.unwrap_model(model)) as applied, tqdm(range(args.steps), desc="fine-tuning") as bar:
        applied.enabled = False
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1.0, (step + 1) / 20, (1 - step / args.steps) / 0.7)
            loss = loss_of(model, applied, next(windows).to(accelerator.device), args.length // 2)
            if not torch.isfinite(loss):
                raise SystemExit(f"the loss is {loss.item()} after {step} steps: try a smaller --lr")
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}")


if __name__ == "__main__":
    main()
