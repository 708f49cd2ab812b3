"""The UNet++ that ships, trained on the real nuclei of the 2018 Data Science Bowl and on made-up ones.

    nice -n 19 python -m demos.real.nuclei_bundled              # half an hour of a core; goes on where it stopped
    python -m demos.real.nuclei_bundled --quick                 # a few steps; results in runs/

Half of a batch are the study's 398 training pictures in their own size, half made-up ones, in crops of three scales,
turned, mirrored, brighter or darker; the training is in bfloat16. Figures are of the study's 133 test pictures, which
nothing was chosen on, and of 300 made-up ones, of every head, with those of the model that ships beside them. The
weights go to runs/; `--ship` puts them where `skipguide segment` finds them.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demos import study
from demos.real import nuclei
from demos.real.weights import NotInstalledError
from demos.training import Recipe, fast_precision, fit
from demos.unetpp.data import Pictures
from demos.unetpp.train import measure
from skipguide.assets import bundled
from skipguide.vision import UNetPlusPlus
from skipguide.vision.segmentation import deep_supervision_loss

OUT = Path(__file__).with_suffix(".json")
WIDTHS = (8, 14, 24, 40, 64)
CROP = 96
SCALES = (64, 96, 144)  # sides of crops, brought to CROP


def batch(real: Pictures, drawn: Pictures, recipe: Recipe, step: int) -> tuple[Tensor, Tensor]:
    """Real and made-up pictures, as many of each, `[batch, C, CROP, CROP]`: a function of the step's number."""
    g = torch.Generator().manual_seed(1_000_003 * recipe.seed + step)
    images, masks = [], []
    for at, part in enumerate((real, drawn)):
        side = SCALES[int(torch.randint(len(SCALES), (), generator=g))] if part is real else CROP
        x, y = part.batch(recipe.batch // 2, side, step, 2 * recipe.seed + at)
        images.append(F.interpolate(x, (CROP, CROP), mode="bilinear", antialias=True))
        masks.append((F.interpolate(y, (CROP, CROP), mode="bilinear", antialias=True) >= 0.5).float())
    found = torch.cat(images)
    exponent = 2 ** (1.6 * torch.rand(len(found), 1, 1, 1, generator=g) - 0.8)
    contrast = 0.6 + 0.4 * torch.rand(len(found), 1, 1, 1, generator=g)
    return contrast * found.clamp(0, 1) ** exponent, torch.cat(masks)


def train(real: Pictures, drawn: Pictures, recipe: Recipe, work: Path) -> UNetPlusPlus:
    """A trained model; its state is kept in `work`."""
    torch.manual_seed(recipe.seed)
    model = UNetPlusPlus(widths=WIDTHS).to(memory_format=torch.channels_last)

    def loss(model: nn.Module, step: int, device: torch.device) -> Tensor:
        images, masks = batch(real, drawn, recipe, step)
        return deep_supervision_loss(model(images.to(device, memory_format=torch.channels_last)), masks.to(device))

    fit(model, loss, recipe, folder=work / "state", desc="nuclei")
    return model.to(memory_format=torch.channels_last).eval()


def figures(model: UNetPlusPlus, parts: dict[str, Pictures]) -> dict[str, Any]:
    """IoU and Dice of every head on every part."""
    return {name: measure(model, part) for name, part in parts.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--quick", action="store_true", help="a few steps and pictures; results in runs/")
    parser.add_argument("--work", type=Path, help="folder of the state and the model (default: runs/nuclei-bundled)")
    parser.add_argument("--out", type=Path, help="JSON of the figures (default: beside this file)")
    parser.add_argument("--force", action="store_true", help="replace results that are there")
    parser.add_argument("--ship", action="store_true", help="put the weights into skipguide/assets/tiny-unetpp")
    args = parser.parse_args(argv)
    runs = study.ROOT / "runs" / f"nuclei-bundled{'-quick' if args.quick else ''}"
    work = args.work or runs
    out = args.out or (runs / "nuclei_bundled.json" if args.quick else OUT)
    study.keep_existing(out, args.force)
    steps, batch = (2, 4) if args.quick else (args.steps, 16)
    recipe = Recipe(steps, lr=3e-3, batch=batch, precision=fast_precision())
    try:
        real, validation, test = nuclei.parts(None, 12 if args.quick else None)
    except NotInstalledError as error:
        raise SystemExit(str(error)) from error
    count = 8 if args.quick else 600
    model = train(real, Pictures.made_up(0, count, CROP), recipe, work)
    parts = {
        "validation": validation,
        "nuclei": test,
        "made-up": Pictures.made_up(200_000, count // 2, 64),
    }
    before = UNetPlusPlus.from_pretrained(bundled("tiny-unetpp")).eval()
    result = {
        "recipe": asdict(recipe),
        "widths": WIDTHS,
        "weights": sum(p.numel() for p in model.parameters()),
        "now": figures(model, parts),
        "before": figures(before, parts),
        "machine": study.machine(),
    }
    model.save_pretrained(work / "model")
    if args.ship:
        for name in ("config.json", "model.safetensors"):  # not the card: the one that ships is written by hand
            shutil.copyfile(work / "model" / name, bundled("tiny-unetpp") / name)
    study.write_json(out, result)
    for when in ("before", "now"):
        for name in parts:
            heads = ", ".join(f"{head} {100 * value['iou']:.1f}" for head, value in result[when][name].items())
            print(f"{when}, {name}: IoU % by head: {heads}")


if __name__ == "__main__":
    main()
