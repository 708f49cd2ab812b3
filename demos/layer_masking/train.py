"""Train the small networks of the study; the best one without erasing is the model that ships.

    python -m demos.layer_masking.train --seed 0            # about 2.5 minutes on one CPU core
    python -m demos.layer_masking.train --seed 0 --erasing  # the same with random erasing
    python -m demos.layer_masking.train --seed 0 1 2 --ship # put the best of them into skipguide/assets/tiny-cnn

The network is timm's `resnet10t` with fewer channels, saved as timm reads it:
`timm.create_model("local-dir:FOLDER", pretrained=True)`.
"""

from __future__ import annotations

import argparse
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from demos.benchmarks.measure import write_json
from demos.layer_masking import data
from demos.training import Recipe, fit
from skipguide.files import replacing

HERE = Path(__file__).parent
RUNS = HERE.parents[1] / "runs" / "layer_masking"
SHIPPED = HERE.parents[1] / "skipguide" / "assets" / "tiny-cnn"
ARCHITECTURE = "resnet10t"
MODEL_ARGS = {"channels": (24, 48, 96, 160), "stem_width": 12}
SCENES, TEST_SCENES = 16384, 2000
TRAIN_SEED, TEST_SEED = 1, 2


make_scenes = lru_cache(maxsize=2)(data.make_scenes)


def build(seed: int = 0) -> nn.Module:
    """The network with random weights."""
    torch.manual_seed(seed)
    return timm.create_model(ARCHITECTURE, num_classes=len(data.CLASSES), **MODEL_ARGS)


def run_folder(seed: int, erasing: bool) -> Path:
    return RUNS / f"{'erasing' if erasing else 'plain'}-{seed}"


def load(folder: Path) -> nn.Module:
    """A trained network in eval mode."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def augmented(images: Tensor, g: torch.Generator) -> Tensor:
    """Turns, flips, shifts and other colours: the class is the shape, so none of it matters to the label."""
    turns, shift = int(torch.randint(4, (), generator=g)), torch.randint(-6, 7, (2,), generator=g).tolist()
    images = images[:, torch.randperm(3, generator=g)]
    images = torch.rot90(images, turns, (2, 3)).roll(shift, (2, 3))
    if torch.rand((), generator=g) < 0.5:
        images = images.flip(3)
    return 255 - images if torch.rand((), generator=g) < 0.5 else images


def erased(x: Tensor, g: torch.Generator, probability: float = 0.5) -> Tensor:
    """Random erasing as torchvision does it by default: 2 to 33 % of the image becomes 0 (after normalisation)."""
    count, _, height, width = x.shape
    area = height * width * (0.02 + 0.31 * torch.rand(count, generator=g))
    aspect = torch.exp(torch.empty(count).uniform_(-1.2, 1.2, generator=g))
    h, w = (area * aspect).sqrt().clamp(max=height), (area / aspect).sqrt().clamp(max=width)
    top, left = torch.rand(count, generator=g) * (height - h), torch.rand(count, generator=g) * (width - w)
    rows, columns = torch.arange(height).view(1, -1, 1), torch.arange(width).view(1, 1, -1)
    t, s, hh, ww = (v.view(-1, 1, 1) for v in (top, left, h, w))
    hole = (rows >= t) & (rows < t + hh) & (columns >= s) & (columns < s + ww)
    hole &= (torch.rand(count, generator=g) < probability).view(-1, 1, 1)
    return x.masked_fill(hole[:, None], 0.0)


def train(seed: int, erasing: bool, steps: int = 1000, scenes: data.Scenes | None = None) -> nn.Module:
    """Train one network; a run that was stopped continues."""
    scenes = scenes or data.make_scenes(SCENES, TRAIN_SEED)
    recipe = Recipe(steps=steps, lr=4e-3, batch=128, weight_decay=0.02, clip=5.0, precision="bf16", seed=seed)
    model = build(seed).to(memory_format=torch.channels_last)

    def loss_of_step(net: nn.Module, step: int, device: torch.device) -> Tensor:
        g = torch.Generator().manual_seed(1_000_003 * seed + step)
        rows = torch.randint(len(scenes), (recipe.batch,), generator=g)
        x = data.normalized(augmented(scenes.images[rows], g))
        x = erased(x, g) if erasing else x
        logits = net(x.to(device, memory_format=torch.channels_last))
        return F.cross_entropy(logits.float(), scenes.labels[rows].to(device), label_smoothing=0.05)

    folder = run_folder(seed, erasing)
    folder.mkdir(parents=True, exist_ok=True)
    return fit(model, loss_of_step, recipe, folder=folder, save_every=200, desc=folder.name)


def save(model: nn.Module, folder: Path, record: dict[str, object]) -> None:
    """fp16 weights and the two files that say what they are."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    with replacing(folder / "model.safetensors") as (weights,):
        save_file({k: v.contiguous() for k, v in state.items()}, weights)
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": len(data.CLASSES),
        "num_features": MODEL_ARGS["channels"][-1],
        "model_args": MODEL_ARGS,
        "pretrained_cfg": {
            "num_classes": len(data.CLASSES),
            "input_size": [3, data.SIZE, data.SIZE],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(data.MEAN),
            "std": list(data.STD),
            "first_conv": "conv1.0",
            "classifier": "fc",
            "pool_size": [2, 2],
            "label_names": list(data.CLASSES),
        },
    }
    write_json(folder / "config.json", config)
    write_json(folder / "training.json", record)


@torch.inference_mode()
def accuracy(model: nn.Module, scenes: data.Scenes) -> float:
    right = 0
    for start in range(0, len(scenes), 256):
        part = scenes[start : start + 256]
        right += int((model(data.normalized(part.images)).argmax(1) == part.labels).sum())
    return right / len(scenes)


def train_and_save(seed: int, erasing: bool, steps: int = 1000) -> dict[str, Any]:
    """Train, round to fp16, measure what was rounded, and write all of it."""
    folder = run_folder(seed, erasing)
    model = train(seed, erasing, steps, make_scenes(SCENES, TRAIN_SEED))
    save(model, folder, {})
    right = accuracy(load(folder), make_scenes(TEST_SCENES, TEST_SEED))
    record = {"seed": seed, "erasing": erasing, "steps": steps, "scenes": SCENES, "accuracy": right}
    write_json(folder / "training.json", record)
    return record


def record_of(folder: Path) -> dict[str, Any]:
    """What was written about a training."""
    return dict(json.loads((folder / "training.json").read_text(encoding="utf-8")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--erasing", action="store_true")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--ship", action="store_true")
    args = parser.parse_args()
    if args.ship:
        folder = max((run_folder(seed, False) for seed in args.seed), key=lambda f: record_of(f)["accuracy"])
        record = record_of(folder)
        save(load(folder), SHIPPED, record)
        return
    for seed in args.seed:
        print(train_and_save(seed, args.erasing, args.steps), flush=True)


if __name__ == "__main__":
    main()
