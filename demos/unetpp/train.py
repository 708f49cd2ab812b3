"""Train a UNet++ on your pictures, or on made-up nuclei.

    python -m demos.unetpp.train --steps 400 --out runs/nuclei
    python -m demos.unetpp.train --data my-folder --encoder resnet18 --pretrained --crop 256 --out runs/mine
    accelerate launch -m demos.unetpp.train --data my-folder --precision bf16 --out runs/mine

`--data` holds images/NAME.png and masks/NAME.png. Stopped runs go on where they were. The folder model/ in `--out` is
what `skipguide segment --model` takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from demos.benchmarks.measure import write_json
from demos.training import Recipe, arguments, command, fit
from demos.unetpp.data import Pictures
from skipguide.vision import UNetPlusPlus
from skipguide.vision.segmentation import MaskMeter, deep_supervision_loss, predict_tiled


def loss_on(data: Pictures, recipe: Recipe, crop: int, rank: int = 0, world: int = 1) -> Callable[..., Tensor]:
    """The deep supervision loss on the batch of a step; one head counts as itself."""

    def loss(model: nn.Module, step: int, device: torch.device) -> Tensor:
        images, masks = data.batch(recipe.batch, crop, step, recipe.seed, rank, world)
        images = images.to(device, memory_format=torch.channels_last)
        return deep_supervision_loss(model(images), masks.to(device))

    return loss


@torch.no_grad()
def measure(model: UNetPlusPlus, data: Pictures, tile: int = 256, heads: Any = None) -> dict[str, dict[str, float]]:
    """IoU and Dice over the whole set of every head and, with several, of their mean.

    `mean_iou` is the mean of two: of what is inside, and of what is outside.
    """
    device = next(model.parameters()).device
    wanted = heads or [*model.levels, *(["mean"] if len(model.levels) > 1 else [])]
    found = {}
    for head in wanted:
        meter, outside = MaskMeter(model.classes), MaskMeter(model.classes)
        for images, masks in _of_equal_size(data):
            logits = predict_tiled(lambda x, head=head: model(x, head=head), images.to(device), tile, tile // 8).cpu()
            meter.update(logits, masks)
            outside.update(-logits, 1 - masks)
        found[str(head)] = {
            "iou": meter.pooled_iou,
            "dice": float(meter.dice.mean()),
            "mean_iou": (meter.pooled_iou + outside.pooled_iou) / 2,
        }
    return found


def _of_equal_size(data: Pictures, most: int = 50) -> list[tuple[Tensor, Tensor]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for at, image in enumerate(data.images):
        groups.setdefault(tuple(image.shape), []).append(at)
    parts = [rows[at : at + most] for rows in groups.values() for at in range(0, len(rows), most)]
    return [(torch.stack([data.images[r] for r in p]), torch.stack([data.masks[r] for r in p])) for p in parts]


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, steps=400, batch=8)
    parser.add_argument("--data", type=Path, help="folder with images/ and masks/; made-up nuclei without")
    parser.add_argument("--pretrained", action="store_true", help="timm's weights for the backbone")
    parser.add_argument(
        "--coarse",
        action="store_true",
        help="with --encoder: masks at its finest stride; cheaper, worse on small things",
    )
    parser.add_argument("--no-deep-supervision", action="store_true", help="one head: no pruning, no averaging")
    parser.add_argument("--crop", type=int, default=64, help="side of the crops in pixels")
    command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    recipe = Recipe(args.steps, args.lr, args.batch, precision=args.precision, seed=args.seed)
    data = Pictures.made_up(0, 600, args.crop) if args.data is None else Pictures.of_folder(args.data)
    train, validation = data.split(0.2, seed=0)
    torch.manual_seed(args.seed)
    model = UNetPlusPlus(
        encoder=args.encoder,
        full_resolution=args.encoder is not None and not args.coarse,
        deep_supervision=not args.no_deep_supervision,
        widths=args.widths,
        pretrained=args.pretrained,
    ).to(memory_format=torch.channels_last)
    accelerator = Accelerator(mixed_precision=args.precision, cpu=args.cpu)
    world = accelerator.num_processes
    loss = loss_on(train, recipe, args.crop, accelerator.process_index, world)
    fit(model, loss, recipe, folder=args.out, stop_after=args.stop_after, accelerator=accelerator)
    if not accelerator.is_main_process or (args.stop_after is not None and args.stop_after < args.steps):
        return
    heads = measure(model, validation)
    best = max(heads, key=lambda head: heads[head]["iou"])
    model.cpu().save_pretrained(args.out / "model")
    record = {"recipe": asdict(recipe), "train": len(train), "validation": len(validation), "heads": heads}
    write_json(args.out / "measures.json", {**record, "best_head": best})
    for head, value in heads.items():
        print(f"head {head:>4}: IoU {100 * value['iou']:.1f}  Dice {100 * value['dice']:.1f}")
    print(f"best head on validation: {best}; model in {args.out / 'model'}")


if __name__ == "__main__":
    main()
