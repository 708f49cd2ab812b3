"""Measure a text-to-video model of these clips: generate prompts with its stock pipeline, read clips and frames.

python -m demos.bundled_model.evaluate --model skipguide/assets/tiny-t2v --prompts 256 --tune 2 3 4 6
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from demos.bundled_model.classifier import AttributeClassifier
from demos.bundled_model.clips import ATTRIBUTES, ClipSpec, all_specs, caption, held_out, labels, render
from demos.bundled_model.common import atomically, contact_sheet
from demos.bundled_model.frame_classifier import READ, FrameClassifier, stability
from skipguide.pipelines.bundled import call_of

HERE = Path(__file__).parent


def choose(number: int, seed: int, unseen: bool | None = None) -> list[ClipSpec]:
    """Random combinations; `unseen` restricts them to held-out ones or to those of training."""
    pool = [spec for spec in all_specs() if unseen is None or held_out(spec) == unseen]
    return random.Random(seed).sample(pool, number)


def generate(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    call: dict[str, Any],
    seed: int,
    workers: int = 2,
    label: str = "generate",
) -> Tensor:
    """One stock pipeline call per prompt, [N, T, 3, 64, 64] in [0, 1]; worker threads share the weights."""

    def one(item: tuple[int, str]) -> Tensor:
        index, prompt = item
        own = {name: copy.deepcopy(pipe.components[name]) for name in ("scheduler", "vae")}  # both keep state in a call
        mine = type(pipe)(**{**pipe.components, **own})
        mine.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(seed + index)
        return mine(prompt, output_type="pt", generator=generator, **call).frames[0]

    with ThreadPoolExecutor(workers) as pool:
        return torch.stack(
            list(tqdm(pool.map(one, enumerate(prompts)), total=len(prompts), desc=label, mininterval=10))
        )


def accuracy(classifier: AttributeClassifier, clips: Tensor, specs: Sequence[ClipSpec]) -> dict[str, float]:
    """Share of clips read as asked, per attribute and for all of them together."""
    right = classifier.correct(clips, labels(specs))
    right["all"] = torch.stack(list(right.values())).all(0)
    return {name: round(hits.float().mean().item(), 4) for name, hits in right.items()}


def steadiness(judge: FrameClassifier, clips: Tensor, specs: Sequence[ClipSpec]) -> dict[str, float]:
    """What single frames say about the shape.

    `same` is the mean share of a clip's frames that say what most of them say, `steady` the share of clips in which at
    least 95 % do, and the others how many frames show the attribute that was asked for.
    """
    read, truth = judge.read(clips), labels(specs)
    same = stability(read["shape"])
    found = {"same": same.mean(), "steady": (same >= 0.95).float().mean()}
    found |= {name: (read[name] == truth[name][:, None]).float().mean() for name in READ}
    return {name: round(value.item(), 4) for name, value in found.items()}


@torch.no_grad()
def reconstruct(pipe: DiffusionPipeline, clips: Tensor) -> Tensor:
    """Clips through encoder and decoder."""
    decoded = []
    for clip in clips * 2 - 1:
        latents = pipe.vae.encode(clip.transpose(0, 1)[None]).latent_dist.mean
        decoded.append(pipe.vae.decode(latents).sample[0].transpose(0, 1))
    return (torch.stack(decoded) / 2 + 0.5).clamp(0, 1)


def psnr(clips: Tensor, others: Tensor) -> float:
    """Peak signal to noise ratio of clips in [0, 1], in dB."""
    return round(-10 * math.log10((clips - others).square().mean().item()), 2)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a pipeline with its generation.json")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--steps", type=int, help="default: what generation.json says")
    parser.add_argument("--guidance", type=float, help="default: what generation.json says")
    parser.add_argument("--tune", type=float, nargs="*", default=[], help="guidance scales to try first")
    parser.add_argument("--tune-prompts", type=int, default=48)
    parser.add_argument("--real", type=int, default=128, help="rendered clips that show what the judges can do")
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    torch.set_num_threads(1)  # the workers are the threads
    pipe = DiffusionPipeline.from_pretrained(args.model)
    call = call_of(args.model, type(pipe))
    call |= {"num_inference_steps": args.steps or call["num_inference_steps"]}
    frames = call["num_frames"]
    classifier, judge = AttributeClassifier.load(), FrameClassifier.load()
    results: dict[str, Any] = {"steps": call["num_inference_steps"], "prompts": args.prompts}

    real_specs = choose(args.real, args.seed + 1)
    real = render(real_specs, args.seed, frames)
    decoded = reconstruct(pipe, real)
    unseen_rows = [i for i, spec in enumerate(real_specs) if held_out(spec)]
    results["vae_psnr_held_out"] = psnr(decoded[unseen_rows], real[unseen_rows])
    for name, clips in (("real", real), ("reconstructed", decoded)):
        results[f"accuracy_{name}"] = accuracy(classifier, clips, real_specs)
        results[f"frames_{name}"] = steadiness(judge, clips, real_specs)

    guidance = args.guidance or call["guidance_scale"]
    if args.tune:
        tuned = {}
        specs = choose(args.tune_prompts, args.seed + 3, unseen=False)
        for scale in args.tune:
            own = call | {"guidance_scale": scale}
            clips = generate(pipe, list(map(caption, specs)), own, 5_000_000, args.workers, f"w={scale}")
            tuned[scale] = accuracy(classifier, clips, specs) | {"same": steadiness(judge, clips, specs)["same"]}
        guidance = max(tuned, key=lambda scale: (tuned[scale]["all"], tuned[scale]["same"]))
        results["guidance_grid"] = {"prompts": args.tune_prompts, "accuracy": tuned}
    results["guidance_scale"] = guidance

    # Four prompts in five show combinations of training, the fifth a combination that training never showed.
    unseen = args.prompts // 5
    specs = choose(args.prompts - unseen, args.seed + 4, False) + choose(unseen, args.seed + 4, True)
    start = time.perf_counter()
    clips = generate(pipe, list(map(caption, specs)), call | {"guidance_scale": guidance}, args.seed, args.workers)
    results["seconds_per_clip"] = round((time.perf_counter() - start) / len(specs), 2)
    parts = {"": slice(None), "_seen": slice(None, -unseen), "_held_out": slice(-unseen, None)}
    for name, part in parts.items():
        results[f"accuracy{name}"] = accuracy(classifier, clips[part], specs[part])
        results[f"frames{name}"] = steadiness(judge, clips[part], specs[part])
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
