"""Judge the bundled language model on the files it never saw: perplexity per token and byte, samples, the loss curve.

python -m demos.bundled_lm.evaluate --model skipguide/assets/tiny-lm --log runs/lm
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from demos.benchmarks.measure import keep_existing, machine, write_json
from demos.bundled_lm.text import files, held_out

CONTEXT = 1024
PROMPTS = (
    "def read_lines(path):\n",
    "class Queue:\n",
    'def test_empty(self):\n    """',
    "import os\nimport sys\n\n\ndef main(",
    "    for name, value in ",
    "    try:\n        return self._",
)
HERE = Path(__file__).parent


def held_out_texts(bytes_limit: int | None = None) -> Iterator[tuple[str, str]]:
    """Held-out files in order, until `bytes_limit` is reached."""
    total = 0
    for name, text in files():
        if held_out(name):
            yield name, text
            total += len(text.encode())
            if bytes_limit and total >= bytes_limit:
                return


def windows(tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int = CONTEXT) -> list[Tensor]:
    """Each text as [T] ids after an end mark, cut into windows of `length`; a rest under 16 tokens is left out."""
    found = []
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        pieces = [torch.tensor(ids[start : start + length]) for start in range(0, len(ids), length)]
        found += [piece for piece in pieces if len(piece) >= 16]
    return found


@torch.no_grad()
def losses(model: LlamaForCausalLM, pieces: list[Tensor]) -> tuple[float, int]:
    """Sum of the losses in nats, and the number of tokens they are of."""
    total, count = 0.0, 0
    for ids in tqdm(pieces, desc="held out", leave=False):
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
        count += len(ids) - 1
    return total, count


def samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tokens: int = 120) -> list[dict[str, str]]:
    """What the model writes after each prompt, sampled at temperature 0.7."""
    found = []
    for number, prompt in enumerate(PROMPTS):
        torch.manual_seed(number)
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        out = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=tokens,
            do_sample=True, temperature=0.7, top_p=0.95,
        )  # fmt: skip
        found.append({"prompt": prompt, "continuation": tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])})
    return found


def curve(log: Path, out: Path) -> None:
    """The loss over training, as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, label, style in (("loss.csv", "training text", "-"), ("held_out.csv", "held-out files", "o-")):
        with (log / name).open() as file:
            rows = list(csv.DictReader(file))
        x, y = ([float(row[key]) for row in rows] for key in ("seconds", "loss"))
        axis.plot([s / 60 for s in x], y, style, label=label, ms=3)
    axis.set(xlabel="minutes on one CPU core", ylabel="loss, nats per token", ylim=(None, 4.5))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def evaluate(folder: Path) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = [text for _, text in held_out_texts()]
    pieces = windows(tokenizer, texts)
    total, count = losses(model, pieces)
    size = sum(len(tokenizer.decode(piece[1:]).encode()) for piece in pieces)  # of the tokens that were predicted
    per_token = total / count
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "megabytes": round(sum(file.stat().st_size for file in folder.iterdir()) / 1e6, 2),
        "layers": model.config.num_hidden_layers,
        "held_out": {
            "files": len(texts),
            "bytes": size,
            "tokens": count,
            "loss_nats_per_token": round(per_token, 4),
            "perplexity_per_token": round(math.exp(per_token), 3),
            "bits_per_byte": round(per_token / math.log(2) * count / size, 4),
            "perplexity_per_byte": round(math.exp(per_token * count / size), 4),
        },
        "samples": samples(model, tokenizer),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True, help="folder of the training: loss.csv, held_out.csv")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    parser.add_argument("--force", action="store_true", help="replace existing results")
    args = parser.parse_args()
    keep_existing(args.out, args.force)
    torch.set_num_threads(1)
    with (args.log / "held_out.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    result = evaluate(args.model)
    steps, minutes = int(last["step"]), float(last["seconds"]) / 60
    result["training"] = {"steps": steps, "tokens": 4096 * steps, "minutes": round(minutes, 1), "threads": 1}
    write_json(args.out, {"machine": machine(), **result})
    curve(args.log, args.out.with_name("loss.png"))
    print(result["held_out"])


if __name__ == "__main__":
    main()
