"""Does routing by input help? SkipNets against their controls, on wires (needed depth differs) and on digits.

    python -m demos.skipnet              # some 15 minutes on one CPU core
    python -m demos.skipnet --quick      # two minutes; results in runs/

For every seed: a dense network is trained; gates are added and trained with a price on computation (two prices), with
the cross-entropy alone, and, as in the paper, with the hybrid reinforcement loss after that. Beside each priced network
stand its controls at equal or more compute: random gates at the same rates, the best fixed subset of its blocks, that
of the dense network trained on for as many steps, and smaller networks trained for as many steps in all.
Subsets are chosen on validation images; every figure is of test images that nothing was chosen on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from demos import study
from demos.skipnet.data import Data, digits, wires
from demos.skipnet.figures import figure, pictures
from demos.skipnet.pictures import saliency, spearman
from demos.skipnet.report import text
from demos.skipnet.wires import turn_and_recolour
from skipguide.vision import SkipNet
from skipguide.vision.skipnet.evaluate import Evaluation, best_subset, evaluate, fixed_gates, random_gates
from skipguide.vision.skipnet.train import TrainConfig, train

HOME = Path(__file__).parent


@dataclass(frozen=True)
class Task:
    """One data set and the networks for it."""

    name: str
    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    classes: int
    channels: int
    size: int
    counts: tuple[int, int, int]
    smaller: tuple[tuple[int, ...], ...]
    dense_steps: int
    gate_steps: int
    reinforce_steps: int
    prices: tuple[float, ...]
    lr: float = 5e-3
    gate_lr: float = 5.0
    longest: tuple[int, int] = (0, 0)  # steps of the wires, in either half of the images

    def data(self, seed: int) -> Data:
        """The images of a seed."""
        if self.name == "wires":
            return wires(self.size, self.longest, self.counts, seed)
        return digits(self.counts, seed)


WIRES = Task(
    "wires", (6,), (16,), 4, 3, 10, (12000, 800, 1500), ((2,), (3,), (4,)), 500, 250, 80, (0.1, 0.3), longest=(5, 12)
)
DIGITS = Task(
    "digits", (4, 4, 4), (8, 16, 32), 10, 1, 8, (1000, 200, 597),
    ((1, 1, 1), (2, 2, 2)), 200, 150, 60, (0.2, 0.6),
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Everything that the figures depend on."""

    seeds: tuple[int, ...] = (0, 1, 2)
    tasks: tuple[Task, ...] = (WIRES, DIGITS)


FULL = Settings()
QUICK = Settings(
    seeds=(0,),
    tasks=(
        Task("wires", (4,), (12,), 4, 3, 10, (2000, 200, 300), ((2,),), 120, 60, 20, (0.3,), longest=(3, 8)),
        Task("digits", (2, 2), (8, 16), 10, 1, 8, (800, 200, 400), ((1, 1),), 60, 40, 20, (0.4,)),
    ),
)


class Seed:
    """One seed of one task: trains, keeps every network's state, and measures."""

    def __init__(self, task: Task, seed: int, folder: Path) -> None:
        self.task, self.seed, self.folder = task, seed, folder / f"{task.name}-{seed}"
        self.data = task.data(seed)
        self.images, self.labels = self.data.test.images, self.data.test.labels

    def build(self, blocks: Sequence[int]) -> SkipNet:
        torch.manual_seed(1000 + self.seed)
        backbone = {
            "blocks": list(blocks),
            "widths": list(self.task.widths),
            "num_classes": self.task.classes,
            "in_channels": self.task.channels,
        }
        return SkipNet(backbone, gate="rnn", image_size=(self.task.channels, self.task.size, self.task.size))

    def train(self, name: str, net: SkipNet, steps: int, decisions: Tensor | None = None, **terms: Any) -> SkipNet:
        config = TrainConfig(
            steps=steps, lr=terms.pop("lr", self.task.lr), gate_lr=self.task.gate_lr, seed=self.seed, **terms
        )
        augment = turn_and_recolour if self.task.name == "wires" else None
        train(net, self.data.train.dataset, config, out=self.folder / name, augment=augment, decisions=decisions)
        return net

    def measure(self, net: SkipNet, mode: str = "hard", decide: Any = None) -> Evaluation:
        return evaluate(net, self.images, self.labels, mode, decide, seed=self.seed)

    def run(self) -> dict[str, Any]:
        task = self.task
        dense = self.train("dense", self.build(task.blocks), task.dense_steps, stage="dense")
        full = self.measure(dense, "open")
        out: dict[str, Any] = {"dense": full.to_dict(), "gated": {}, "smaller": {}}
        for blocks in task.smaller:
            small = self.train(
                f"smaller-{blocks}", self.build(blocks), task.dense_steps + task.gate_steps, stage="dense"
            )
            found = self.measure(small, "open").to_dict()
            found["macs_fraction"] = small.costs().dense / dense.costs().dense
            out["smaller"][str(sum(blocks))] = found | {"blocks": sum(blocks)}
        for price in task.prices:
            name = f"budget {price}"
            gated = self.opened(dense)
            self.train(name, gated, task.gate_steps, stage="budget", budget_weight=price)
            out["gated"][name] = self.report(gated) | {"controls": self.controls(gated, dense, name)}
            if price == task.prices[-1]:
                after = self.train(
                    f"{name} then RL", copy.deepcopy(gated), task.reinforce_steps, **self.reinforce(price)
                )
                out["gated"][f"{name} then RL"] = self.report(after)
        supervised = self.train("supervised", self.opened(dense), task.gate_steps, stage="supervised")
        out["gated"]["supervised"] = self.report(supervised)
        after = self.train(
            "supervised then RL", copy.deepcopy(supervised), task.reinforce_steps, **self.reinforce(task.prices[-1])
        )
        out["gated"]["supervised then RL"] = self.report(after)
        return out

    def opened(self, dense: SkipNet) -> SkipNet:
        gated = copy.deepcopy(dense)
        torch.manual_seed(2000 + self.seed)
        gated.gates = type(gated.gates)(gated.gates.channels)  # type: ignore[call-arg]
        gated.gates.open_by(1.0)
        return gated

    def reinforce(self, price: float) -> dict[str, Any]:
        # alpha pays for skipping every block what the price charges for running it
        return {"stage": "reinforce", "alpha": price, "rl_weight": 1.0, "sharpen": 3.0, "lr": self.task.lr / 5}

    def report(self, net: SkipNet) -> dict[str, Any]:
        hard, sampled = self.measure(net), self.measure(net, "sample")
        difficulty, blocks = self.data.test.difficulty, hard.blocks
        found = hard.to_dict() | {
            "sampled": sampled.to_dict(),
            "rates": hard.gates.double().mean(0).tolist(),
            "blocks_sd": float(blocks.double().std()),
            "blocks_with_difficulty": _number(spearman(difficulty, blocks)),
            "per_class": hard.per_class(self.labels),
            "by_difficulty": _by(difficulty, hard),
        }
        if self.seed == 0:
            pixels = saliency(net, self.images)
            found["blocks_with_saliency"] = _number(spearman(pixels, blocks))
            scale = self.images.flatten(1).clamp(0, 1).mean(1)
            found["blocks_with_ink"] = _number(spearman(scale, blocks))
            found["images"] = {
                "blocks": blocks.tolist(),
                "difficulty": [round(v, 4) for v in difficulty.tolist()],
                "saliency": [round(v, 6) for v in pixels.tolist()],
                "ink": [round(v, 5) for v in scale.tolist()],
            }
        return found

    def controls(self, gated: SkipNet, dense: SkipNet, name: str) -> dict[str, Any]:
        hard = self.measure(gated)
        rates = hard.gates.double().mean(0)
        draws = [self.measure(gated, decide=random_gates(rates, 10 * self.seed + at)) for at in range(3)]
        random = {key: sum(d.to_dict()[key] for d in draws) / len(draws) for key in draws[0].to_dict()}
        kept = math.ceil(hard.mean_blocks - 1 - 1e-9)  # rounded up: the control gets no less compute
        validation = self.data.validation
        images, labels = validation.images[:300], validation.labels[:300]
        subset = best_subset(gated, images, labels, kept, rates)
        same = self.measure(gated, decide=fixed_gates(subset))
        chosen = best_subset(dense, images, labels, kept)
        tuned = self.train(f"fixed for {name}", copy.deepcopy(dense), self.task.gate_steps, chosen, stage="fixed")
        best = self.measure(tuned, decide=fixed_gates(chosen))
        return {
            "random": random,
            "fixed": same.to_dict(),
            "fixed, trained on": best.to_dict() | {"by_difficulty": _by(self.data.test.difficulty, best)},
        }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _by(difficulty: Tensor, found: Evaluation) -> list[dict[str, float]]:
    """Accuracy and blocks in six parts of equal size, from easy to hard."""
    return [
        {
            "difficulty": float(difficulty[part].mean()),
            "accuracy": float(found.correct[part].double().mean()),
            "blocks": float(found.blocks[part].double().mean()),
        }
        for part in difficulty.argsort(stable=True).chunk(6)
    ]


def compute(settings: Settings, work: Path) -> dict[str, Any]:
    cells = study.Cells(work, asdict(settings))
    todo = [(task, seed) for seed in settings.seeds for task in settings.tasks]
    found: dict[str, list[dict[str, Any]]] = {task.name: [] for task in settings.tasks}
    for task, seed in tqdm(todo, desc="seeds"):

        def one(task: Task = task, seed: int = seed) -> Mapping[str, Any]:
            return Seed(task, seed, work / "states").run()

        found[task.name].append(cells(f"{task.name}-{seed}", one))
    return {"settings": asdict(settings), "tasks": {name: summary(runs) for name, runs in found.items()}}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, and the paired differences between each priced network and its controls."""

    def over(get: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        return study.spread(value for run in runs if (value := get(run)) is not None)

    def figures(get: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        return {key: over(lambda run, key=key: get(run)[key]) for key in ("accuracy", "blocks", "macs_fraction")}

    gated: dict[str, Any] = {}
    priced = [name for name, found in runs[0]["gated"].items() if "controls" in found][-1]  # its images are drawn
    for name, first in runs[0]["gated"].items():
        row = figures(lambda run, name=name: run["gated"][name])
        row["sampled"] = figures(lambda run, name=name: run["gated"][name]["sampled"])
        known = [run["gated"][name]["blocks_with_difficulty"] for run in runs]
        row["blocks_with_difficulty"] = study.spread(v or 0.0 for v in known)
        row["by_difficulty"] = [
            {
                key: over(lambda run, at=at, key=key, name=name: run["gated"][name]["by_difficulty"][at][key])
                for key in part
            }
            for at, part in enumerate(first["by_difficulty"])
        ]
        keys = ("rates", "per_class", "images") if name == priced else ("rates", "per_class")
        row["first_seed"] = {k: first[k] for k in keys if k in first}
        for key in ("blocks_with_saliency", "blocks_with_ink"):
            row["first_seed"][key] = first.get(key)
        for control in first.get("controls", {}):
            mine = figures(lambda run, name=name, control=control: run["gated"][name]["controls"][control])
            mine["gated_minus_control"] = over(
                lambda run, name=name, control=control: (
                    run["gated"][name]["accuracy"] - run["gated"][name]["controls"][control]["accuracy"]
                )
            )
            row.setdefault("controls", {})[control] = mine
        if "controls" in first:
            row["controls"]["smaller network"] = _smaller(runs, name)
        gated[name] = row
    return {
        "dense": figures(lambda run: run["dense"]),
        "smaller": {k: figures(lambda run, k=k: run["smaller"][k]) for k in runs[0]["smaller"]},
        "gated": gated,
    }


def _smaller(runs: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Per seed the smallest ungated network with no less compute than the gated one (or the largest there is)."""
    picks = []
    for run in runs:
        enough = sorted(run["smaller"].values(), key=lambda s: s["macs_fraction"])
        mine = run["gated"][name]
        picks.append(
            (mine, next((s for s in enough if s["macs_fraction"] >= mine["macs_fraction"] - 0.02), enough[-1]))
        )
    found = {key: study.spread(pick[key] for _, pick in picks) for key in ("accuracy", "blocks", "macs_fraction")}
    found["gated_minus_control"] = study.spread(mine["accuracy"] - pick["accuracy"] for mine, pick in picks)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    args = study.arguments(__doc__, HOME).parse_args(argv)
    out, work = study.places(args, HOME)
    torch.set_num_threads(1)
    settings = QUICK if args.quick else FULL
    result = compute(settings, work)
    example = settings.tasks[0].data(settings.seeds[0]).test
    study.save_figure(pictures(example, result["tasks"][settings.tasks[0].name]), out / "images.png")
    study.publish(out, result, text(result), figure(result))
