"""Train a SkipNet: made-up wires, sklearn's digits, or torchvision's CIFAR and SVHN where you have them.

    python -m demos.skipnet.train --out runs/wires
    python -m demos.skipnet.train --data cifar10 --root ~/data --network resnet38 --steps 20000 --out runs/cifar
    accelerate launch -m demos.skipnet.train --data cifar10 --root ~/data --stages supervised reinforce --out runs/paper

The stages run one after the other, `--steps` each; a stopped run goes on where it was. `--out` gets, per stage,
history.csv and its curves (history.png); then model/ (for `SkipNet.from_pretrained`), measures.json (hard, sampled,
random gates of the same rates; per class) and images.png, test images in the order of the blocks they used.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor
from torch.nn import functional

from demos import study
from demos.benchmarks.measure import write_json
from demos.skipnet.data import TORCHVISION, Data, torchvision_set
from demos.skipnet.pictures import draw_by_blocks, draw_history
from demos.skipnet.study import DIGITS, WIRES
from demos.skipnet.wires import turn_and_recolour
from demos.training import command
from skipguide.vision import SkipNet
from skipguide.vision.skipnet.evaluate import evaluate, random_gates
from skipguide.vision.skipnet.train import DECIDED, STAGES, Augment, TrainConfig, train

TASKS = {task.name: task for task in (WIRES, DIGITS)}


def shift_and_mirror(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """CIFAR's usual augmentation: four pixels of padding, a crop, and a mirror image every second time."""
    n, _, height, width = images.shape
    padded = functional.pad(images, (4, 4, 4, 4))
    tops, lefts = torch.randint(9, (2, n, 1), generator=generator)
    rows, columns = tops + torch.arange(height), lefts + torch.arange(width)
    columns = torch.where(torch.rand(n, 1, generator=generator) < 0.5, columns, columns.flip(1))
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None]].movedim(3, 1), labels


def build(args: argparse.Namespace) -> tuple[SkipNet, Data, Augment | None]:
    """The network, its images and their augmentation."""
    if args.data in TASKS:
        task = TASKS[args.data]
        data, classes, augment = task.data(args.seed), task.classes, turn_and_recolour if task is WIRES else None
        small = {"blocks": list(task.blocks), "widths": list(task.widths), "num_classes": classes}
        backbone = args.network or small | {"in_channels": task.channels}
    else:
        data, classes = torchvision_set(args.data, args.root, args.download), TORCHVISION[args.data][1]
        augment, backbone = None if args.data == "svhn" else shift_and_mirror, args.network or "resnet38"
    torch.manual_seed(args.seed)
    size = tuple(data.train.images.shape[1:])
    return SkipNet(backbone, args.gate, num_classes=classes, image_size=size), data, augment


def run(args: argparse.Namespace) -> None:
    net, data, augment = build(args)
    accelerator = Accelerator(
        mixed_precision=args.precision,
        cpu=args.cpu,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    for at, stage in enumerate(args.stages):
        config = TrainConfig(
            stage=stage, steps=args.steps, batch_size=args.batch, lr=args.lr, gate_lr=args.gate_lr,
            budget_weight=args.price, alpha=args.alpha, seed=args.seed,
        )  # fmt: skip
        folder = args.out / f"{at}-{stage}"
        history = train(net, data.train.dataset, config, out=folder, augment=augment, accelerator=accelerator)
        if accelerator.is_main_process:
            drawing, axes = study.canvas(1, 3)
            draw_history(axes.ravel(), history)
            study.save_figure(drawing, folder / "history.png")
    if accelerator.is_main_process:
        report(net.cpu(), data, args)


def report(net: SkipNet, data: Data, args: argparse.Namespace) -> None:
    """Measures on the test images, and what they used."""
    images, labels = data.test.images, data.test.labels
    hard, sampled = (evaluate(net, images, labels, mode, seed=args.seed) for mode in ("hard", "sample"))
    random = evaluate(net, images, labels, decide=random_gates(hard.gates.float().mean(0), args.seed))
    found = {"hard gates": hard, "sampled gates": sampled, "random gates of the same rates": random}
    for name, value in found.items():
        print(f"{name}: {100 * value.accuracy:.1f} % right, {100 * value.macs_fraction:.0f} % of the MACs")
    net.save_pretrained(args.out / "model")
    measures = {name: value.to_dict() for name, value in found.items()}
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    write_json(args.out / "measures.json", {**measures, "per_class": hard.per_class(labels), "settings": settings})
    drawing, axes = study.canvas(2, 8, 1.9, 1.9)
    draw_by_blocks(axes.ravel(), images, hard.blocks)
    study.save_figure(drawing, args.out / "images.png")
    print(f"model in {args.out / 'model'}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the states, the model and its measures")
    parser.add_argument("--data", choices=(*TASKS, *TORCHVISION), default="wires")
    parser.add_argument("--root", type=Path, default=Path("data"), help="where torchvision's sets are")
    parser.add_argument("--download", action="store_true", help="let torchvision fetch the set")
    parser.add_argument("--network", help="a name that skipnet() knows; a small network for wires and digits")
    parser.add_argument("--gate", choices=("rnn", "ff1", "ff2"), default="rnn")
    learned = [stage for stage in STAGES if stage not in DECIDED]
    parser.add_argument("--stages", nargs="+", choices=learned, default=["dense", "budget"])
    parser.add_argument("--steps", type=int, default=400, help="of every stage")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--gate-lr", type=float, default=5.0, help="of the gates, as a multiple")
    parser.add_argument("--price", type=float, default=0.3, help="of running every block, in the stage budget")
    parser.add_argument("--alpha", type=float, default=0.1, help="reward of skipping, in the stage reinforce")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="leave an accelerator alone")
    command(run, parser.parse_args(argv))


if __name__ == "__main__":
    main()
