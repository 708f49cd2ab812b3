"""Train the bundled language model on one CPU core, on the standard library's source text.

The schedule is a function of the seconds spent training, because time is the budget: warm-up, constant, then linear
to 0. Time in which the process was stopped does not count. It resumes when started again.

    python -m demos.bundled_lm.train --out runs/lm --minutes 64
"""

from __future__ import annotations

import argparse
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demos.bundled_lm.text import encode, files, held_out, train_tokenizer
from demos.bundled_model.common import atomically, log_row
from demos.bundled_model.optim import optimizers

logger = logging.getLogger(__name__)
VOCABULARY = 2048
TOKENS_PER_STEP = 4096
WARMUP_STEPS, DECAY_SHARE = 100, 0.4
LENGTHS = ((0.5, 128), (0.9, 256), (1.0, 1024))  # until this share of the time: tokens per window; short is fast
LIBRARY_SHARE = 0.7  # of the training windows; the rest is from the library's tests
LONGEST_STEP = 20.0  # seconds; more than that was not spent training


def build(attention: str = "eager") -> LlamaForCausalLM:
    """The architecture: deep and narrow, so that there are many sublayers to choose from."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:  # a residual stream that starts small: branches write little at first
        for out in (layer.self_attn.o_proj, layer.mlp.down_proj):
            nn.init.normal_(out.weight, std=0.02 / (2 * config.num_hidden_layers) ** 0.5)
    return model


def rate(progress: float, step: int) -> float:
    """The share of the peak learning rate at this moment."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (1 - progress) / DECAY_SHARE)


def length(progress: float) -> int:
    """Tokens per window at this moment."""
    return next(tokens for until, tokens in LENGTHS if progress <= until)


def windows(stream: NDArray[np.uint16], count: int, tokens: int, rng: np.random.Generator) -> Tensor:
    starts = rng.integers(0, len(stream) - tokens, count)
    return torch.from_numpy(stream[starts[:, None] + np.arange(tokens)].astype(np.int64))  # [count, tokens], also of 0


def batch(text: dict[str, NDArray[np.uint16]], tokens: int, rng: np.random.Generator) -> Tensor:
    rows = TOKENS_PER_STEP // tokens
    library = rng.binomial(rows, LIBRARY_SHARE)
    return torch.cat(
        [windows(text["library"], library, tokens, rng), windows(text["tests"], rows - library, tokens, rng)]
    )


def load_text(out: Path) -> tuple[PreTrainedTokenizerFast, dict[str, NDArray[np.uint16]]]:
    """The tokenizer and the three token streams, made once."""
    cache, folder = out / "text.npz", out / "tokenizer"
    if not cache.exists():
        library, tests = list(files()), list(files(tests=True))
        tokenizer = train_tokenizer([text for name, text in library if not held_out(name)], VOCABULARY)
        tokenizer.save_pretrained(folder)
        parts = {
            "library": [text for name, text in library if not held_out(name)],
            "tests": [text for name, text in tests if not held_out(name)],
            "held_out": [text for name, text in library if held_out(name)],
        }
        streams = {name: encode(tokenizer, texts) for name, texts in parts.items()}
        atomically(cache, lambda path: np.savez(path.open("wb"), **streams))
    loaded = np.load(cache)
    return AutoTokenizer.from_pretrained(folder), {name: loaded[name] for name in loaded.files}


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A stock checkpoint in half precision, replaced as a whole."""
    half = LlamaForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.half()
    half.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=0, pad_token_id=1, do_sample=True, temperature=0.8, top_p=0.95
    )
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    half.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


@torch.no_grad()
def validate(model: LlamaForCausalLM, stream: NDArray[np.uint16]) -> float:
    """Mean loss (nats per token) on the same 32 held-out windows each time."""
    rows = windows(stream, 32, 256, np.random.default_rng(0))
    losses = [model(input_ids=r, labels=r, use_cache=False).loss.item() for r in rows.split(8)]
    return sum(losses) / len(losses)


def train(out: Path, minutes: float, lr: float, seed: int = 0, save_every: float = 150.0) -> None:
    set_seed(seed)
    tokenizer, text = load_text(out)
    logger.info("tokens: %s", {name: len(stream) for name, stream in text.items()})
    model = build()
    opts = optimizers(model, lr=lr, weight_decay=0.05, outer=("embed_tokens",))
    step, spent, state = 0, 0.0, out / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        for opt, s in zip(opts, saved["opts"], strict=True):
            opt.load_state_dict(s)
        step, spent = saved["step"], saved["spent"]
    compiled: Callable[[Tensor], Tensor] = torch.compile(
        lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss, dynamic=False
    )
    budget, last_save, smooth = 60 * minutes, spent, None
    bar = tqdm(total=round(budget), initial=round(spent), unit="s", mininterval=10, smoothing=0)
    while spent < budget:
        start = time.monotonic()
        progress = spent / budget
        rng = np.random.default_rng([seed, step])
        ids = batch(text, length(progress), rng)
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = lr * rate(progress, step)
            opt.step()
            opt.zero_grad(set_to_none=True)
        value = loss.item()
        if not np.isfinite(value):
            raise RuntimeError(f"loss is {value} at step {step}")
        smooth = value if smooth is None else 0.98 * smooth + 0.02 * value
        step += 1
        spent += min(time.monotonic() - start, LONGEST_STEP if step > 5 else 120.0)
        bar.n = round(spent)
        bar.set_postfix(step=step, loss=f"{smooth:.3f}", refresh=False)
        bar.update(0)
        if step % 50 == 0:
            row = {
                "step": step,
                "seconds": round(spent, 1),
                "loss": round(smooth, 4),
                "lr": opts[0].param_groups[0]["lr"],
            }
            log_row(out / "loss.csv", row)
        if spent - last_save > save_every or spent >= budget:
            last_save = spent
            saved = {"model": model.state_dict(), "opts": [o.state_dict() for o in opts], "step": step, "spent": spent}
            atomically(state, lambda path, saved=saved: torch.save(saved, path))
            export(model, tokenizer, out / "model")
            log_row(
                out / "held_out.csv",
                {"step": step, "seconds": round(spent, 1), "loss": validate(model, text["held_out"])},
            )
    bar.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint, the curve and the model")
    parser.add_argument("--minutes", type=float, default=64.0, help="time to train, one core (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    train(args.out, args.minutes, args.lr, args.seed)


if __name__ == "__main__":
    main()
