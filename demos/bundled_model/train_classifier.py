"""Train the attribute classifier on rendered clips with mild noise, blur and colour jitter.

It sees every combination, held-out ones too: it is the judge, not the model under test.

    python -m demos.bundled_model.train_classifier --minutes 8
"""

from __future__ import annotations

import argparse
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from demos.bundled_model.classifier import WEIGHTS, AttributeClassifier
from demos.bundled_model.clips import all_specs, held_out, labels, render
from demos.bundled_model.common import Clock, atomically
from demos.bundled_model.optim import optimizers


def augment(clips: Tensor) -> Tensor:
    """Noise, blur and colour jitter, each drawn per clip."""
    count = len(clips)
    frames = clips.flatten(0, 1)
    blurred = F.avg_pool2d(frames, 3, 1, 1, count_include_pad=False).view_as(clips)
    amount = (torch.rand(count, 1, 1, 1, 1) * 1.4 - 0.4).clamp(min=0)
    clips = torch.lerp(clips, blurred, amount)
    clips = clips * (1 + 0.05 * torch.randn(count, 1, 3, 1, 1)) + 0.03 * torch.randn(count, 1, 3, 1, 1)
    return clips + torch.rand(count, 1, 1, 1, 1) * 0.06 * torch.randn_like(clips)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    specs, model = all_specs(), AttributeClassifier().to(memory_format=torch.channels_last)
    opts = optimizers(model, args.lr, weight_decay=0.02, outer=("heads", "points"))
    clock, step, average = Clock(args.minutes), 0, 0.0
    bar = tqdm(total=100, desc="classifier", mininterval=10, bar_format="{l_bar}{bar}| {elapsed} {postfix}")

    def draw(number: int) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = rng.choices(specs, k=args.batch)
        return augment(render(chosen, args.seed * 1_000_003 + number)), labels(chosen)

    while (progress := clock.progress) < 1:
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = args.lr * min(1.0, (step + 1) / 50, 2 * (1 - progress))
        clips, truth = draw(step)
        logits = model(clips)
        loss = sum(F.cross_entropy(logits[name], truth[name]) for name in truth)
        loss.backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
        step += 1
        average = loss.item() if step == 1 else 0.97 * average + 0.03 * loss.item()
        bar.n = round(100 * progress)
        bar.set_postfix_str(f"step {step} loss {average:.4f}", refresh=False)
        bar.update(0)
    bar.close()
    model.save(args.out)

    model = AttributeClassifier.load(args.out)
    test = random.Random(args.seed + 1).sample(specs, 1024)
    chunks = [test[i : i + 64] for i in range(0, len(test), 64)]

    def judge(index: int) -> dict[str, Tensor]:
        return model.correct(render(chunks[index], 900_000_001 + index), labels(chunks[index]))

    with ThreadPoolExecutor(args.threads) as pool:
        judged = list(pool.map(judge, range(len(chunks))))
    right = {name: torch.cat([part[name] for part in judged]) for name in judged[0]}
    unseen = torch.tensor([held_out(spec) for spec in test])
    report = {
        "clips": len(test),
        "steps": step,
        "minutes": round(clock.spent / 60, 1),
        "accuracy": {name: round(hits.float().mean().item(), 4) for name, hits in right.items()},
        "accuracy_held_out": {name: round(hits[unseen].float().mean().item(), 4) for name, hits in right.items()},
    }
    text = json.dumps(report, indent=2) + "\n"
    atomically(args.out.with_suffix(".json"), lambda path: path.write_text(text))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
