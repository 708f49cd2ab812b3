"""Measure the bundled model: generate prompts with the stock pipeline, read every clip with the classifier.

python -m demos.bundled_model.evaluate --model skipguide/assets/tiny-t2v --prompts 256 --tune 2 3 4 6
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from diffusers import LattePipeline
from torch import Tensor
from tqdm import tqdm

from demos.bundled_model.classifier import AttributeClassifier
from demos.bundled_model.clips import ATTRIBUTES, ClipSpec, all_specs, caption, held_out, labels, render
from demos.bundled_model.common import atomically, contact_sheet
from demos.bundled_model.train_vae import frame_pool, psnr

HERE = Path(__file__).parent


def choose(number: int, seed: int, unseen: bool | None = None) -> list[ClipSpec]:
    """Random combinations; `unseen` restricts them to held-out ones or to those of training."""
    pool = [spec for spec in all_specs() if unseen is None or held_out(spec) == unseen]
    return random.Random(seed).sample(pool, number)


def generate(
    pipe: LattePipeline,
    prompts: Sequence[str],
    steps: int,
    guidance: float,
    seed: int,
    workers: int = 2,
    label: str = "generate",
) -> Tensor:
    """One stock pipeline call per prompt, [N, 16, 3, 64, 64] in [0, 1]; worker threads share the weights."""

    def one(item: tuple[int, str]) -> Tensor:
        index, prompt = item
        mine = LattePipeline(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
        mine.set_progress_bar_config(disable=True)
        return mine(
            prompt,
            height=64,
            width=64,
            video_length=16,
            num_inference_steps=steps,
            guidance_scale=guidance,
            clean_caption=False,
            output_type="pt",
            generator=torch.Generator().manual_seed(seed + index),
        ).frames[0]

    with ThreadPoolExecutor(workers) as pool:
        return torch.stack(
            list(tqdm(pool.map(one, enumerate(prompts)), total=len(prompts), desc=label, mininterval=10))
        )


def accuracy(classifier: AttributeClassifier, clips: Tensor, specs: Sequence[ClipSpec]) -> dict[str, float]:
    """Share of clips read as asked, per attribute and for all of them together."""
    right = classifier.correct(clips, labels(specs))
    right["all"] = torch.stack(list(right.values())).all(0)
    return {name: round(hits.float().mean().item(), 4) for name, hits in right.items()}


@torch.no_grad()
def reconstruct(pipe: LattePipeline, clips: Tensor) -> Tensor:
    """Clips through encoder and decoder."""
    decoded = [pipe.vae.decode(pipe.vae.encode(clip * 2 - 1).latent_dist.mean).sample for clip in clips]
    return (torch.stack(decoded) / 2 + 0.5).clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--tune", type=float, nargs="*", default=[], help="guidance scales to try first")
    parser.add_argument("--tune-prompts", type=int, default=48)
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the workers are the threads
    pipe = LattePipeline.from_pretrained(args.model)
    classifier = AttributeClassifier.load()
    results: dict[str, object] = {"steps": args.steps, "prompts": args.prompts}

    real_specs = choose(128, args.seed + 1)
    real = render(real_specs, args.seed)
    frames = frame_pool([spec for spec in all_specs() if held_out(spec)], 64, args.seed + 2, per_clip=2)
    results["vae_psnr_held_out"] = round(psnr(pipe.vae, frames), 2)
    results["accuracy_real"] = accuracy(classifier, real, real_specs)
    results["accuracy_reconstructed"] = accuracy(classifier, reconstruct(pipe, real), real_specs)

    guidance = args.guidance
    if args.tune:
        tuned = {}
        specs = choose(args.tune_prompts, args.seed + 3, unseen=False)
        for scale in args.tune:
            clips = generate(pipe, list(map(caption, specs)), args.steps, scale, 5_000_000, args.workers, f"w={scale}")
            tuned[scale] = accuracy(classifier, clips, specs)
        guidance = max(tuned, key=lambda scale: tuned[scale]["all"])
        results["guidance_grid"] = {"prompts": args.tune_prompts, "accuracy": tuned}
    results["guidance_scale"] = guidance

    # Four prompts in five show combinations of training, the fifth a combination that training never showed.
    unseen = args.prompts // 5
    specs = choose(args.prompts - unseen, args.seed + 4, False) + choose(unseen, args.seed + 4, True)
    start = time.perf_counter()
    clips = generate(pipe, list(map(caption, specs)), args.steps, guidance, args.seed, args.workers)
    results["seconds_per_clip"] = round((time.perf_counter() - start) / len(specs), 2)
    results["accuracy"] = accuracy(classifier, clips, specs)
    results["accuracy_seen"] = accuracy(classifier, clips[:-unseen], specs[:-unseen])
    results["accuracy_held_out"] = accuracy(classifier, clips[-unseen:], specs[-unseen:])
    results["chance"] = {name: round(1 / len(values), 3) for name, values in ATTRIBUTES.items()}
    text = json.dumps(results, indent=2) + "\n"
    atomically(args.out, lambda path: path.write_text(text))
    shown = [*range(5), *range(len(specs) - 3, len(specs))]
    contact_sheet(
        args.out.with_name("samples.png"),
        [
            (f"{caption(specs[i])}{'  (combination not in training)' if held_out(specs[i]) else ''}", clips[i])
            for i in shown
        ],
    )
    print(text)


if __name__ == "__main__":
    main()
