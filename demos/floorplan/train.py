"""Train a floor plan net on the files of Modified Swiss Dwellings, or on made-up plans.

    python -m demos.floorplan.train --steps 650 --out runs/plans
    python -m demos.floorplan.train --data msd/train --side 128 --batch 8 --steps 20000 --out runs/msd
    accelerate launch -m demos.floorplan.train --data msd/train --precision bf16 --out runs/msd

`--data` holds struct_in, graph_in and full_out. Stopped runs go on where they were. The folder model/ in `--out` is
what `skipguide floorplan --model` takes; with `--submit` the plans of another folder are drawn as the challenge wants.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from demos.benchmarks.measure import write_json
from demos.floorplan.data import batch, made_up
from demos.training import Recipe, arguments, command, fit
from skipguide.errors import SkipError
from skipguide.vision.floorplan import (
    BACKGROUND,
    IGNORE,
    STRUCTURE,
    FloorPlanNet,
    LayoutGraph,
    MSDFolder,
    Plan,
    collate,
    save_submission,
)
from skipguide.vision.segmentation import ClassMeter

GraphOf = Callable[[LayoutGraph], LayoutGraph]


def loss_on(
    plans: Sequence[Plan], recipe: Recipe, edges: bool = True, rank: int = 0, world: int = 1
) -> Callable[..., Tensor]:
    """Cross-entropy on the batch of a step; structure and background count twice, as published."""
    weight = torch.ones(BACKGROUND + 1)
    weight[[STRUCTURE, BACKGROUND]] = 2.0
    kept = plans if edges else without_edges(plans)

    def loss(model: nn.Module, step: int, device: torch.device) -> Tensor:
        images, graphs, targets = batch(kept, recipe.batch, step, recipe.seed, rank, world)
        images = images.to(device, memory_format=torch.channels_last)
        logits = model(images, None if _graph(model) is None else graphs)
        return F.cross_entropy(logits.float(), targets.to(device), weight.to(device), ignore_index=IGNORE)

    return loss


def _graph(model: nn.Module) -> str | None:
    inner = getattr(model, "module", model)
    assert isinstance(inner, FloorPlanNet)
    return inner.graph


def without_edges(plans: Sequence[Plan]) -> list[Plan]:
    """The same plans, their graphs without connections."""
    return [Plan(p.image, p.graph.without_edges(), p.target, p.name) for p in plans]


def with_graphs_of_others(plans: Sequence[Plan]) -> list[Plan]:
    """Every plan with the graph of the next: the control that shows what the graphs cause."""
    return [Plan(p.image, plans[(at + 1) % len(plans)].graph, p.target, p.name) for at, p in enumerate(plans)]


@torch.no_grad()
def measure(net: FloorPlanNet, plans: Sequence[Plan], size: int = 16) -> dict[str, float]:
    """Mean IoU over the set, over its room classes alone, the challenge's form (batches of `size`), and accuracy."""
    meter = ClassMeter(net.classes, IGNORE)
    device = next(net.parameters()).device
    for at in range(0, len(plans), size):
        images, graphs, targets = collate(plans[at : at + size])
        assert targets is not None
        meter.update(net(images.to(device), None if net.graph is None else graphs).cpu(), targets)
    return {
        "miou": meter.mean_iou,
        "rooms": float(meter.iou[:STRUCTURE].nanmean()),
        "challenge_miou": meter.challenge_miou,
        "accuracy": meter.accuracy,
    }


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, steps=650, batch=16)
    parser.add_argument("--data", type=Path, help="folder with struct_in, graph_in and full_out; made-up plans without")
    parser.add_argument("--side", type=int, help="pixels to reduce --data to; a side of 32 for made-up plans")
    parser.add_argument("--gap", type=int, default=0, help="close openings of the outer walls when filling")
    parser.add_argument("--graph", choices=("map", "attention", "vector", "none"), default="map")
    parser.add_argument("--dropout", type=float, default=0.5, help="between the graph convolutions")
    parser.add_argument("--plans", type=int, default=2500, help="how many plans to make up")
    parser.add_argument("--submit", type=Path, help="folder of plans to draw as <id>.png into OUT/submission")
    command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    recipe = Recipe(args.steps, args.lr, args.batch, precision=args.precision, seed=args.seed)
    if args.data is None:
        plans = made_up(0, args.plans, args.side or 32)
    else:
        folder = MSDFolder(args.data, args.side, args.gap)
        if not folder.has_targets:
            raise SkipError(f"expected {args.data}/full_out: training needs the classes")
        plans = [folder[at] for at in tqdm(range(len(folder)), desc="reading plans", disable=None)]
    if len(plans) < 2:
        raise SkipError(f"expected at least two plans, to keep some for validation; got {len(plans)}")
    order = torch.randperm(len(plans), generator=torch.Generator().manual_seed(0)).tolist()
    held = max(1, len(plans) // 10)
    validation, train = [plans[at] for at in order[:held]], [plans[at] for at in order[held:]]
    torch.manual_seed(args.seed)
    graph = None if args.graph == "none" else args.graph
    net = FloorPlanNet(args.encoder, graph=graph, widths=args.widths, dropout=args.dropout)
    net = net.to(memory_format=torch.channels_last)
    accelerator = Accelerator(mixed_precision=args.precision, cpu=args.cpu)
    loss = loss_on(train, recipe, rank=accelerator.process_index, world=accelerator.num_processes)
    fit(net, loss, recipe, folder=args.out, stop_after=args.stop_after, accelerator=accelerator)
    if not accelerator.is_main_process or (args.stop_after is not None and args.stop_after < args.steps):
        return
    found = measure(net, validation)
    net.cpu().save_pretrained(args.out / "model")
    write_json(args.out / "measures.json", {"recipe": asdict(recipe), "plans": len(plans), "validation": found})
    print("  ".join(f"{name} {100 * value:.1f}" for name, value in found.items()))
    print(f"model in {args.out / 'model'}")
    if args.submit is not None:
        submit(net, MSDFolder(args.submit, args.side, args.gap), args.out / "submission")


@torch.no_grad()
def submit(net: FloorPlanNet, folder: MSDFolder, out: Path) -> None:
    """Draw every plan of a folder for the challenge."""
    for at in tqdm(range(len(folder)), desc="submission", disable=None):
        images, graphs, _ = collate([folder[at]])
        save_submission(net(images, None if net.graph is None else graphs)[0], out, folder.ids[at])


if __name__ == "__main__":
    main()
