"""UNet++ against U-Nets on made-up nuclei, and what pruning costs.

    python -m demos.unetpp.study             # some 15 minutes on one CPU core
    python -m demos.unetpp.study --quick     # two minutes; results in runs/

Four models: U-Net, a wide U-Net with as many weights as the UNet++, and the UNet++ without and with deep supervision.
Every model's learning rate is chosen from the same grid on validation pictures (another seed, fewer steps), then it
is trained with every seed. The head (L1 to L4 or their mean) is chosen on validation pictures, per seed; figures are
of test pictures that nothing was chosen on. Times are process CPU seconds, side by side in turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from tqdm import tqdm

from demos import study
from demos.benchmarks.measure import Ratio, interleaved
from demos.training import Recipe, fit
from demos.unetpp.data import Pictures
from demos.unetpp.train import loss_on, measure
from skipguide.vision import UNetPlusPlus
from skipguide.vision.segmentation import MaskMeter

HOME = Path(__file__).parent
MODELS = ("U-Net", "wide U-Net", "UNet++", "UNet++ deep supervision")
DEEP = MODELS[3]


@dataclass(frozen=True)
class Settings:
    """Everything that the figures depend on."""

    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    steps: int = 400
    tuning_steps: int = 200
    tuning_seed: int = 100
    batch: int = 8
    size: int = 64
    train: int = 600
    validation: int = 150
    test: int = 300
    rounds: int = 15
    widths: tuple[int, ...] = (8, 14, 24, 40, 64)
    wide: tuple[int, ...] = (9, 16, 27, 46, 73)
    tolerances: tuple[float, ...] = field(default=(0.02, 0.05, 0.1))


FULL = Settings()
QUICK = Settings(seeds=(0, 1), rates=(3e-3,), steps=60, tuning_steps=1, train=200, validation=50, test=100, rounds=5)


def build(name: str, settings: Settings, seed: int) -> UNetPlusPlus:
    """An untrained model."""
    torch.manual_seed(seed)
    widths = settings.wide if name == "wide U-Net" else settings.widths
    model = UNetPlusPlus(widths=widths, nested=name.startswith("UNet++"), deep_supervision=name == DEEP)
    return model.to(memory_format=torch.channels_last)


class Study:
    """The data, and what is computed on it."""

    # that of training, as accelerate calls it; everything is measured in float32. No setting, but noted with what was
    # trained in it: bfloat16 is twice as fast on one processor and ten times as slow on another
    precision = "no"

    def __init__(self, settings: Settings, work: Path, models: Path | None = None) -> None:
        self.settings, self.models = settings, models or work / "models"
        self.cells = study.Cells(work, asdict(settings))
        self.train, self.validation, self.test = self.pictures()

    def pictures(self) -> tuple[Pictures, Pictures, Pictures]:
        """To train on, to choose on, and to report."""
        s = self.settings
        return (
            Pictures.made_up(0, s.train, s.size),
            Pictures.made_up(100_000, s.validation, s.size),
            Pictures.made_up(200_000, s.test, s.size),
        )

    def place(self, name: str, seed: int, lr: float, steps: int) -> Path:
        """Where a trained model is kept."""
        return self.models / f"{name}-{seed}-{lr:g}-{steps}".replace(" ", "-")

    def trained(self, name: str, seed: int, lr: float, steps: int) -> UNetPlusPlus:
        """A trained model; kept in the folder of models."""
        folder = self.place(name, seed, lr, steps)

        def train() -> UNetPlusPlus:
            recipe = Recipe(steps, lr, self.settings.batch, precision=self.precision, seed=seed)
            model, state = build(name, self.settings, seed), folder.with_name(f"{folder.name}-state")
            loss, desc = loss_on(self.train, recipe, self.settings.size), f"{name}, seed {seed}, lr {lr:g}"
            fit(model, loss, recipe, folder=state, desc=desc)
            rmtree(state)
            return model

        return study.kept(folder, UNetPlusPlus.from_pretrained, train).to(memory_format=torch.channels_last).eval()

    def tune(self, name: str) -> dict[str, Any]:
        """The learning rate that is best on validation pictures; by the best head where there are several."""
        s = self.settings
        found = {}
        for lr in s.rates:
            heads = measure(self.trained(name, s.tuning_seed, lr, s.tuning_steps), self.validation)
            found[f"{lr:g}"] = max(value["iou"] for value in heads.values())
        return {
            "validation_iou": found,
            "lr": float(max(found, key=lambda lr: found[lr])),
            "precision": self.precision,
        }

    def run(self, name: str, seed: int, lr: float) -> dict[str, Any]:
        """Train with one seed; choose the head on validation pictures, measure all of them on test pictures."""
        model = self.trained(name, seed, lr, self.settings.steps)
        validation, test = measure(model, self.validation), measure(model, self.test)
        chosen = max(validation, key=lambda head: validation[head]["iou"])
        record = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "chosen": chosen,
            "validation": validation,
            "test": test,
            "precision": self.precision,
        }
        if name == DEEP:
            record["adaptive"] = {f"{t:g}": adaptive(model, self.test, t) for t in self.settings.tolerances}
        return record

    def timed(self, name: str, seed: int, lrs: dict[str, float]) -> UNetPlusPlus:
        """A trained model if it is here, else an untrained one: what it has learned changes no time."""
        if self.place(name, seed, lrs[name], self.settings.steps).exists():
            return self.trained(name, seed, lrs[name], self.settings.steps)
        return build(name, self.settings, seed).eval()

    def times(self, lrs: dict[str, float], seed: int) -> dict[str, Any]:
        """Process CPU time of a batch, of the exported pruned models and of the U-Nets, relative to the last head."""
        s = self.settings
        deep = self.timed(DEEP, seed, lrs)
        models = {f"L{level}": deep.pruned(level) for level in deep.levels}
        models |= {name: self.timed(name, seed, lrs) for name in MODELS[:3]}
        images = torch.stack(list(self.test.images[: s.batch])).to(memory_format=torch.channels_last)
        heads = deep(images)
        equal = {f"L{level}": torch.equal(models[f"L{level}"](images), heads[level - 1]) for level in deep.levels}
        now = {"model": models["L1"]}

        def select(name: str) -> Any:
            now["model"] = models[name]
            return nullcontext()

        turns = {name: (lambda name=name: select(name)) for name in models}
        for name in models:
            models[name](images)
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for clocks in interleaved(turns, lambda: now["model"](images), s.rounds):
            for name, (_, cpu) in clocks.items():
                seconds[name].append(cpu)
        last = seconds[f"L{deep.depth}"]
        return {
            name: {
                "parameters": sum(p.numel() for p in models[name].parameters()),
                "nodes": len(models[name].nodes()),
                "time_to_last": Ratio.of(seconds[name], last).to_dict(),
                "milliseconds": 1000 * sorted(seconds[name])[len(last) // 2],
                **({"bit_equal": equal[name]} if name in equal else {}),
            }
            for name in models
        }


@torch.no_grad()
def adaptive(model: UNetPlusPlus, data: Pictures, tolerance: float) -> dict[str, float]:
    """IoU with `head="adaptive"`, the mean level, and the share of node runs of the full model that were run."""
    meter, levels, ran = MaskMeter(1), [], 0
    for at in range(0, len(data), 50):
        images = torch.stack(list(data.images[at : at + 50])).to(memory_format=torch.channels_last)
        found = model.run(images, "adaptive", tolerance)
        meter.update(found.logits, torch.stack(list(data.masks[at : at + 50])))
        levels += found.levels.tolist()
        ran += sum(found.rows_run.values())
    share = ran / (len(data) * len(model.nodes()))
    return {"iou": meter.pooled_iou, "level": sum(levels) / len(levels), "nodes_run": share}


def compute(settings: Settings, work: Path) -> dict[str, Any]:
    """All cells of the study, with what follows from them."""
    return all_cells(Study(settings, work))


def run_name(model: str, seed: int) -> str:
    """The cell of a model that was trained with a seed."""
    return f"{model} {seed}"


@torch.no_grad()
def all_cells(plan: Study, seeds: Sequence[int] | None = None) -> dict[str, Any]:
    """All cells of a study, on whatever pictures it has; seed by seed, so that a study that is stopped has whole ones.

    Args:
        plan: the study.
        seeds: those to train with, all by default. What is given is of all seeds that have every model.
    """
    settings = plan.settings
    cells = plan.cells
    seeds = settings.seeds if seeds is None else seeds
    bar = tqdm(total=len(MODELS) * (1 + len(seeds)) + 1, desc="study", unit="cell")

    def cell(name: str, work: Any) -> dict[str, Any]:
        with torch.enable_grad():
            found = cells(name, work)
        bar.update()
        return found

    tuned = {name: cell(f"tune {name}", lambda name=name: plan.tune(name)) for name in MODELS}
    lrs = {name: value["lr"] for name, value in tuned.items()}
    for s in seeds:
        for name in MODELS:
            cell(run_name(name, s), lambda name=name, s=s: plan.run(name, s, lrs[name]))
    whole = [s for s in settings.seeds if all(run_name(name, s) in cells for name in MODELS)]
    runs = {name: [cells(run_name(name, s), dict) for s in whole] for name in MODELS}
    times = cell("times", lambda: plan.times(lrs, whole[0]))
    bar.close()
    shown = {**asdict(settings), "seeds": whole}
    return summary({"settings": shown, "tuning": tuned, "runs": runs, "times": times})


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Add means and spreads."""
    models = {}
    for name, runs in result["runs"].items():
        models[name] = {
            "parameters": runs[0]["parameters"],
            "lr": result["tuning"][name]["lr"],
            "iou": study.spread(run["test"][run["chosen"]]["iou"] for run in runs),
            "dice": study.spread(run["test"][run["chosen"]]["dice"] for run in runs),
            "chosen": [run["chosen"] for run in runs],
        }
    deep = result["runs"][DEEP]
    heads = {head: study.spread(run["test"][head]["iou"] for run in deep) for head in deep[0]["test"]}
    adaptive = {
        tolerance: {key: study.spread(run["adaptive"][tolerance][key] for run in deep) for key in values}
        for tolerance, values in deep[0]["adaptive"].items()
    }
    return {**result, "models": models, "heads": heads, "adaptive": adaptive}


def text(result: dict[str, Any]) -> str:
    """The tables."""
    times, s = result["times"], result["settings"]
    rows = [
        (
            name,
            f"{m['parameters']:,}",
            f"{m['lr']:g}",
            ", ".join(m["chosen"] if name == DEEP else ["last"]),
            study.shown(m["iou"], 100),
            study.shown(m["dice"], 100),
            f"{times['L4' if name == DEEP else name]['time_to_last']['median']:.2f}",
        )
        for name, m in result["models"].items()
    ]
    head = ["model", "weights", "learning rate", "heads chosen", "test IoU %", "test Dice %", "time"]
    prune = [
        (
            level,
            f"{times[level]['parameters']:,}",
            times[level]["nodes"],
            f"{times[level]['time_to_last']['median']:.2f}",
            study.shown(result["heads"][level.removeprefix("L")], 100),
            "yes" if times[level]["bit_equal"] else "no",
        )
        for level in ("L1", "L2", "L3", "L4")
    ]
    prune.append(("mean of L1 to L4", "", "", "", study.shown(result["heads"]["mean"], 100), ""))
    prune += [
        (
            f"adaptive, tolerance {tolerance} (mean level {value['level']['mean']:.1f})",
            times["L4"]["parameters"] and f"{times['L4']['parameters']:,}",
            f"{100 * value['nodes_run']['mean']:.0f} %",
            "",
            study.shown(value["iou"], 100),
            "",
        )
        for tolerance, value in result["adaptive"].items()
    ]
    return (
        f"Made-up nuclei, {s['size']} pixels, {s['train']} pictures for training, {s['test']} for testing, "
        f"{s['steps']} steps of {s['batch']}, {len(s['seeds'])} seeds (mean ± sd). "
        "Time of a batch relative to UNet++ L4.\n\n"
        + study.table(head, rows)
        + "\nPruning the UNet++ with deep supervision (the same trained models):\n\n"
        + study.table(["head", "weights", "nodes run", "time", "test IoU %", "bit-equal to the full run"], prune)
    )


def figure(result: dict[str, Any]) -> Any:
    """IoU of the models, and IoU against time by prune level."""
    drawing, axes = study.canvas(1, 2, 5.2, 3.8)
    left, right = axes[0]
    names = list(result["models"])
    for at, name in enumerate(names):
        value = result["models"][name]["iou"]
        points = [100 * v for v in value["values"]]
        left.errorbar(at, 100 * value["mean"], 100 * value["sd"], fmt="o", color=f"C{at}", capsize=5, ms=8)
        if points[1:]:
            left.plot([at + 0.18] * len(points), points, ".", color=f"C{at}", alpha=0.6)
    left.set_xticks(range(len(names)), [n.replace(" deep supervision", "\ndeep superv.") for n in names])
    left.set_ylabel("test IoU %")
    left.set_xlim(-0.5, len(names) - 0.5)
    several = "mean ± sd; dots: seeds" if result["settings"]["seeds"][1:] else "one seed"
    left.set_title(f"Four models, head chosen on validation\n({several})", fontsize=10)
    times = result["times"]
    levels = ["L1", "L2", "L3", "L4"]
    xs = [times[level]["time_to_last"]["median"] for level in levels]
    heads = [result["heads"][level[1:]] for level in levels]
    right.errorbar(
        xs,
        [100 * h["mean"] for h in heads],
        [100 * h["sd"] for h in heads],
        fmt="o-",
        color="C3",
        capsize=5,
        label="UNet++, pruned to head L",
    )
    for level, x, value in zip(levels, xs, heads, strict=True):
        right.annotate(level, (x, 100 * value["mean"]), textcoords="offset points", xytext=(6, -13))
    for at, name in enumerate(MODELS[:2]):
        x = times[name]["time_to_last"]["median"]
        right.plot(x, 100 * result["models"][name]["iou"]["mean"], "s", color=f"C{at}", label=name)
    right.margins(y=0.12)  # the names of the heads stand below them
    right.set_xlabel("CPU time of a batch (UNet++ L4 = 1)")
    right.set_ylabel("test IoU %")
    right.set_title("What pruning costs and saves", fontsize=10)
    right.legend(fontsize=8)
    return drawing


def main(argv: Sequence[str] | None = None) -> None:
    study.main(__doc__, HOME, (FULL, QUICK), compute, text, figure, argv)


if __name__ == "__main__":
    main()
