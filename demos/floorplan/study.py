"""What a layout graph is worth to a floor plan net, and which way in serves it best.

    python -m demos.floorplan.study             # some 15 minutes on one CPU core
    python -m demos.floorplan.study --quick     # two minutes; results in runs/

The same U-Net sees the image alone, or the graph too: as a low-resolution map at the bottleneck (the published
layout), as one vector, by attention from pixels to rooms. Controls: the map's graphs without their edges, and without
any skip connection. The causal control is of the test alone: every trained net is measured again with each plan's graph
exchanged for another plan's. Learning rates are chosen per net from one grid on validation plans, with another seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from demos import study
from demos.floorplan.data import made_up
from demos.floorplan.train import loss_on, measure, with_graphs_of_others, without_edges
from demos.training import Recipe, fit
from skipguide.vision import FloorPlanNet

HOME = Path(__file__).parent
NETS: dict[str, dict[str, Any]] = {
    "image alone": {"graph": None},
    "graph map": {"graph": "map"},
    "attention to rooms": {"graph": "attention"},
    "graph map, edges removed": {"graph": "map"},
    "graph as one vector": {"graph": "vector"},
    "graph map, no skips": {"graph": "map", "skips": False, "reinject": False},
}
NO_EDGES = "graph map, edges removed"
MEASURES = ("miou", "challenge_miou", "rooms", "accuracy")


@dataclass(frozen=True)
class Settings:
    """Everything that the figures depend on."""

    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (1.5e-3, 5e-3)
    steps: int = 650
    tuning_steps: int = 150
    tuning_seed: int = 100
    batch: int = 16
    size: int = 32
    train: int = 2500
    validation: int = 200
    test: int = 500
    widths: tuple[int, ...] = (12, 24, 40, 64)


FULL = Settings()
QUICK = Settings(seeds=(0, 1), rates=(5e-3,), steps=100, tuning_steps=1, train=500, validation=50, test=150)


class Study:
    """The plans, and what is computed on them."""

    def __init__(self, settings: Settings, work: Path) -> None:
        self.settings, self.work = settings, work
        self.cells = study.Cells(work, asdict(settings))
        s = settings
        self.train = made_up(0, s.train, s.size)
        self.validation = made_up(100_000, s.validation, s.size)
        self.test = made_up(200_000, s.test, s.size)

    def trained(self, name: str, seed: int, lr: float, steps: int) -> FloorPlanNet:
        """A trained net; kept in the work folder."""
        folder = self.work / "models" / f"{name}-{seed}-{lr:g}-{steps}".replace(" ", "-").replace(",", "")

        def train() -> FloorPlanNet:
            recipe = Recipe(steps, lr, self.settings.batch, seed=seed)
            torch.manual_seed(seed)
            net = FloorPlanNet(widths=self.settings.widths, **NETS[name]).to(memory_format=torch.channels_last)
            fit(
                net, loss_on(self.train, recipe, edges=name != NO_EDGES), recipe, desc=f"{name}, seed {seed}, lr {lr:g}"
            )
            return net

        return study.kept(folder, FloorPlanNet.from_pretrained, train).to(memory_format=torch.channels_last).eval()

    def tune(self, name: str) -> dict[str, Any]:
        """The learning rate that is best on validation plans."""
        s = self.settings
        plans = without_edges(self.validation) if name == NO_EDGES else self.validation
        found = {
            f"{lr:g}": measure(self.trained(name, s.tuning_seed, lr, s.tuning_steps), plans)["miou"] for lr in s.rates
        }
        return {"validation_miou": found, "lr": float(max(found, key=lambda lr: found[lr]))}

    def run(self, name: str, seed: int, lr: float) -> dict[str, Any]:
        """Train with one seed; measure on validation and test plans, and with exchanged graphs."""
        net = self.trained(name, seed, lr, self.settings.steps)
        plans, validation = (without_edges(p) if name == NO_EDGES else p for p in (self.test, self.validation))
        return {
            "parameters": sum(p.numel() for p in net.parameters()),
            "validation": measure(net, validation, self.settings.batch),
            "test": measure(net, plans, self.settings.batch),
            "exchanged": measure(net, with_graphs_of_others(plans), self.settings.batch),
        }


def compute(settings: Settings, work: Path) -> dict[str, Any]:
    """All cells of the study, with what follows from them."""
    plan = Study(settings, work)
    bar = tqdm(total=len(NETS) * (1 + len(settings.seeds)), desc="study", unit="cell")

    def cell(name: str, work: Any) -> dict[str, Any]:
        found = plan.cells(name, work)
        bar.update()
        return found

    tuned = {name: cell(f"tune {name}", lambda name=name: plan.tune(name)) for name in NETS}
    runs = {
        name: [
            cell(f"{name} {seed}", lambda name=name, seed=seed: plan.run(name, seed, tuned[name]["lr"]))
            for seed in settings.seeds
        ]
        for name in NETS
    }
    bar.close()
    return summary({"settings": asdict(settings), "tuning": tuned, "runs": runs})


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Add means and spreads."""
    nets = {
        name: {
            "parameters": runs[0]["parameters"],
            "lr": result["tuning"][name]["lr"],
            **{key: study.spread(run["test"][key] for run in runs) for key in MEASURES},
            "exchanged": {key: study.spread(run["exchanged"][key] for run in runs) for key in MEASURES},
        }
        for name, runs in result["runs"].items()
    }
    return {**result, "nets": nets}


def text(result: dict[str, Any]) -> str:
    """The table."""
    s = result["settings"]
    rows = [
        (
            name,
            f"{net['parameters']:,}",
            f"{net['lr']:g}",
            study.shown(net["miou"], 100),
            study.shown(net["challenge_miou"], 100),
            study.shown(net["rooms"], 100),
            study.shown(net["accuracy"], 100),
            study.shown(net["exchanged"]["miou"], 100),
            study.shown(net["exchanged"]["rooms"], 100),
        )
        for name, net in result["nets"].items()
    ]
    head = [
        "net",
        "weights",
        "learning rate",
        "mIoU %, whole set",
        f"mIoU %, challenge's form (batches of {s['batch']})",
        "mIoU %, rooms only",
        "pixels right %",
        "mIoU %, graphs exchanged",
        "rooms only, graphs exchanged",
    ]
    return (
        f"Made-up plans, {s['size']} pixels, {s['train']} for training, {s['test']} for testing, {s['steps']} steps of "
        f"{s['batch']}, {len(s['seeds'])} seeds (mean ± sd).\n\n" + study.table(head, rows)
    )


def figure(result: dict[str, Any]) -> Any:
    """mIoU of the nets, with their own graphs and with exchanged ones."""
    drawing, axes = study.canvas(1, 2, 5.4, 3.8)
    names = list(result["nets"])
    for axis, key, title in (
        (axes[0][0], "miou", "All classes"),
        (axes[0][1], "rooms", "Rooms only (without walls and background)"),
    ):
        for shift, kind, label in ((-0.2, "own", "the plan's own graph"), (0.2, "other", "another plan's graph")):
            values = [(net if kind == "own" else net["exchanged"])[key] for net in result["nets"].values()]
            axis.barh(
                [at + shift for at in range(len(names))],
                [100 * v["mean"] for v in values],
                0.38,
                xerr=[100 * v["sd"] for v in values],
                color="C0" if kind == "own" else "0.75",
                label=label,
                error_kw={"capsize": 3, "lw": 1},
            )
        axis.set_yticks(range(len(names)), names if key == "miou" else [""] * len(names))
        axis.invert_yaxis()
        axis.set_xlabel("test mIoU %")
        axis.set_title(title, fontsize=10)
    axes[0][1].legend(fontsize=8)
    return drawing


def main(argv: Sequence[str] | None = None) -> None:
    study.main(__doc__, HOME, (FULL, QUICK), compute, text, figure, argv)


if __name__ == "__main__":
    main()
