"""Skip DEQ: what a learned guess saves, where the guess alone is enough, and where it is not.

    python -m demos.skip_deq.study             # some ten minutes on one CPU core
    python -m demos.skip_deq.study --quick     # a minute; results in runs/

Digits: a plain DEQ, one with a learned guess, one that starts at f(0, x), and the guess trained alone. Memory: at every
place of a sequence, name the mark that was seen last. A guess that sees 8 places back cannot know what lies further;
the equilibrium can, and news travels one place per evaluation. Trained on sequences of 24, tested on 96 with marks
three times as rare. Controls there: a weaker skip loss, and one that trains the guess alone (stop-gradient).

Digits are pretrained by unrolling, far enough to come near the equilibrium. The control "plain, 5 unrolled" is
pretrained with five steps: that trains a transient of a cell which has no stable equilibrium on many rows.

Every variant's learning rate is chosen from the same grid on validation examples, with another seed.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from demos import study
from demos.skip_deq.tasks import Examples, Net, build, digits, sequences
from skipguide.vision.skip_deq import ConvergenceWarning, skip_loss

HOME = Path(__file__).parent
# Weight of the skip loss, and whether it trains the guess alone.
VARIANTS: dict[str, dict[str, tuple[float, bool]]] = {
    "digits": {
        "plain": (0, False),
        "plain, 5 unrolled": (0, False),
        "Skip": (1, False),
        "Skip-Reg": (1, False),
        "guess alone": (0, False),
    },
    "memory": {
        "plain": (0, False),
        "Skip": (1, False),
        "Skip, weight 0.1": (0.1, False),
        "Skip, stop-gradient": (1, True),
        "Skip-Reg": (1, False),
        "guess alone": (0, False),
    },
}


@dataclass(frozen=True)
class Settings:
    """Everything that the figures depend on."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    digits_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    memory_rates: tuple[float, ...] = (5e-3, 1e-2, 2e-2)
    tuning_seed: int = 100
    digits_tuning_share: float = 1.0
    tuning_share: float = 0.5
    digits_steps: int = 300
    digits_batch: int = 64
    digits_tol: float = 1e-3
    pretraining: int = 33  # steps of unrolled iterations, for digits
    unrolled: int = 30
    memory_steps: int = 300
    memory_batch: int = 16
    memory_tol: float = 1e-2
    length: int = 24
    density: float = 0.15
    test_length: int = 96
    test_density: float = 0.05
    window: int = 8
    test: int = 200
    single: int = 100
    budget: int = 120


FULL = Settings()
QUICK = Settings(
    seeds=(0, 1),
    digits_rates=(1e-2,),
    memory_rates=(1e-2,),
    digits_tuning_share=0.02,
    tuning_share=0.02,
    digits_steps=120,
    memory_steps=150,
    test=60,
    single=20,
)


def examples(task: str, settings: Settings) -> tuple[Examples, Examples, Examples]:
    """For training, validation and testing."""
    if task == "digits":
        return digits()
    s = settings
    return (
        sequences(2000, s.length, s.density, 1),
        sequences(200, s.length, s.density, 2),
        sequences(s.test, s.test_length, s.test_density, 3),
    )


def train(task: str, variant: str, seed: int, lr: float, steps: int, s: Settings) -> tuple[Net, dict[str, Any]]:
    """A trained net, and what its training cost."""
    data, _, _ = examples(task, s)
    on_digits = task == "digits"
    tol, batch = (s.digits_tol, s.digits_batch) if on_digits else (s.memory_tol, s.memory_batch)
    weight, stop = VARIANTS[task][variant]
    net = build(task, variant, tol, s.budget, seed, s.window)
    optimiser = torch.optim.Adam(net.parameters(), lr, foreach=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(seed)
    depth = 5 if variant.endswith("5 unrolled") else s.unrolled
    solved, forward, backward, unfinished = 0, 0, 0, 0
    began = time.process_time()
    for step in tqdm(range(steps), desc=f"{task}, {variant}, seed {seed}, lr {lr:g}", leave=False, mininterval=2.0):
        rows = torch.randint(len(data.inputs), (batch,), generator=generator)
        unroll = depth if on_digits and net.deq.budget and step < s.pretraining * steps / s.digits_steps else 0
        logits, z, info = net(data.inputs[rows], unroll)
        loss = F.cross_entropy(logits.flatten(0, -2), data.classes[rows].flatten())
        if weight:
            loss = loss + weight * skip_loss(z, info.guess, stop_gradient=stop)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if not unroll and net.deq.budget:
            solved, forward, backward = (
                solved + 1,
                forward + info.evaluations,
                backward + info.backward_evaluations,
            )
            unfinished += not info.converged
    return net.eval(), {
        "train_cpu_seconds": time.process_time() - began,
        "train_evaluations": forward / max(solved, 1),
        "backward_evaluations": backward / max(solved, 1),
        "unfinished_solves": unfinished,
    }


@torch.no_grad()
def measure(net: Net, data: Examples, window: int) -> dict[str, float]:
    """Accuracy of the equilibrium and of its guess; for sequences also where the answer lies beyond the window."""
    logits, _, info = net(data.inputs)
    right = logits.argmax(-1) == data.classes
    guessed = net.classifier(info.guess).argmax(-1) == data.classes
    found = {
        "accuracy": float(right.float().mean()),
        "guess_accuracy": float(guessed.float().mean()),
        "evaluations": float(info.evaluations),
        "converged": float(info.converged),
    }
    if data.distance is not None:
        far = data.distance >= window
        found["far_accuracy"] = float(right[far].float().mean())
        found["far_guess_accuracy"] = float(guessed[far].float().mean())
    return found


@torch.no_grad()
def one_by_one(net: Net, data: Examples, count: int) -> dict[str, Any]:
    """Evaluations that single examples take, and for sequences the longest distance in each."""
    evaluations = [net(data.inputs[at : at + 1])[2].evaluations for at in range(min(count, len(data.inputs)))]
    longest = [] if data.distance is None else data.distance[:count].max(1).values.tolist()
    return {"evaluations": evaluations, "longest": longest}


def tune(task: str, variant: str, s: Settings) -> dict[str, Any]:
    """The learning rate that is best on validation examples."""
    on_digits = task == "digits"
    whole, share = (s.digits_steps, s.digits_tuning_share) if on_digits else (s.memory_steps, s.tuning_share)
    steps = max(1, round(share * whole))
    _, validation, _ = examples(task, s)
    found = {}
    for lr in s.digits_rates if on_digits else s.memory_rates:
        net, _ = train(task, variant, s.tuning_seed, lr, steps, s)
        found[f"{lr:g}"] = measure(net, validation, s.window)["accuracy"]
    return {"validation_accuracy": found, "lr": float(max(found, key=lambda lr: found[lr]))}


def run(task: str, variant: str, seed: int, lr: float, s: Settings) -> dict[str, Any]:
    """Train with one seed and test."""
    steps = s.digits_steps if task == "digits" else s.memory_steps
    net, cost = train(task, variant, seed, lr, steps, s)
    _, _, test = examples(task, s)
    return {**cost, **measure(net, test, s.window), "single": one_by_one(net, test, s.single)}


def compute(settings: Settings, work: Path) -> dict[str, Any]:
    """All cells of the study, with what follows from them."""
    warnings.simplefilter("ignore", ConvergenceWarning)  # counted in `unfinished_solves` and `converged`
    cells = study.Cells(work, asdict(settings))
    bar = tqdm(total=sum(map(len, VARIANTS.values())) * (1 + len(settings.seeds)), desc="study", unit="cell")

    def cell(name: str, work: Any) -> dict[str, Any]:
        found = cells(name, work)
        bar.update()
        return found

    tuning: dict[str, Any] = {}
    runs: dict[str, Any] = {}
    for task, variants in VARIANTS.items():
        tuning[task] = {v: cell(f"tune {task} {v}", lambda t=task, v=v: tune(t, v, settings)) for v in variants}
        runs[task] = {v: [] for v in variants}
        # Seed by seed, so that a variant's seconds are taken beside the others'.
        for seed in settings.seeds:
            for v in variants:
                lr = tuning[task][v]["lr"]
                found = cell(f"{task} {v} {seed}", lambda t=task, v=v, seed=seed, lr=lr: run(t, v, seed, lr, settings))
                runs[task][v].append(found)
    bar.close()
    return summary({"settings": asdict(settings), "tuning": tuning, "runs": runs})


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Add means and spreads; training seconds relative to the plain DEQ's of the same seed."""
    tasks: dict[str, Any] = {}
    for task, variants in result["runs"].items():
        tasks[task] = {}
        for name, runs in variants.items():
            keys = [key for key, value in runs[0].items() if isinstance(value, int | float)]
            entry: dict[str, Any] = {key: study.spread(run[key] for run in runs) for key in keys}
            entry["lr"] = result["tuning"][task][name]["lr"]
            entry["single_evaluations"] = study.spread(
                sum(run["single"]["evaluations"]) / len(run["single"]["evaluations"]) for run in runs
            )
            entry["train_time"] = study.spread(
                run["train_cpu_seconds"] / plain["train_cpu_seconds"]
                for run, plain in zip(runs, variants["plain"], strict=True)
            )
            tasks[task][name] = entry
    return {**result, "tasks": tasks}


def text(result: dict[str, Any]) -> str:
    """The tables."""
    s, tasks = result["settings"], result["tasks"]
    head = ["digits", "learning rate", "test accuracy %", "its guess %", "evaluations per training step"]
    head += ["unfinished solves of a training", "backward", "evaluations, one test digit", "training time (plain = 1)"]
    rows = []
    for name, entry in tasks["digits"].items():
        none = name == "guess alone"
        rows.append(
            (
                name,
                f"{entry['lr']:g}",
                study.shown(entry["accuracy"], 100),
                study.shown(entry["guess_accuracy"], 100),
                "0" if none else study.shown(entry["train_evaluations"]),
                "0" if none else study.shown(entry["unfinished_solves"]),
                "0" if none else study.shown(entry["backward_evaluations"]),
                "0" if none else study.shown(entry["single_evaluations"]),
                study.shown(entry["train_time"], 1, 2),
            )
        )
    first = study.table(head, rows)
    head = ["memory", "learning rate", "test accuracy %", f"answer {s['window']} or more places back %"]
    head += ["its guess %", "its guess there %", "evaluations per training step", "evaluations, one test sequence"]
    head += ["training time (plain = 1)"]
    rows = []
    for name, entry in tasks["memory"].items():
        none = name == "guess alone"
        rows.append(
            (
                name,
                f"{entry['lr']:g}",
                study.shown(entry["accuracy"], 100),
                study.shown(entry["far_accuracy"], 100),
                study.shown(entry["guess_accuracy"], 100),
                study.shown(entry["far_guess_accuracy"], 100),
                "0" if none else study.shown(entry["train_evaluations"]),
                "0" if none else study.shown(entry["single_evaluations"]),
                study.shown(entry["train_time"], 1, 2),
            )
        )
    return (
        f"{len(s['seeds'])} seeds (mean ± sd). Digits: Anderson, tolerance {s['digits_tol']:g}, pretrained "
        f"by {s['unrolled']} unrolled steps. Memory: plain "
        f"iterations, tolerance {s['memory_tol']:g}; trained on sequences of {s['length']}, tested on "
        f"{s['test_length']}; chance is 25 %.\n\n" + first + "\n" + study.table(head, rows)
    )


def figure(result: dict[str, Any]) -> Any:
    """Accuracy against evaluations on both tasks, and evaluations by the longest distance."""
    drawing, axes = study.canvas(1, 3, 4.4, 3.7)
    names = [*result["tasks"]["memory"], *result["tasks"]["digits"]]
    colours = {name: f"C{at}" for at, name in enumerate(dict.fromkeys(names))}
    for axis, task, key, title in (
        (axes[0][0], "digits", "accuracy", "Digits: the guess alone is enough"),
        (axes[0][1], "memory", "far_accuracy", "Memory: answers beyond the guess's window"),
    ):
        for name, entry in result["tasks"][task].items():
            cost = 0.0 if name == "guess alone" else entry["single_evaluations"]["mean"]
            axis.errorbar(
                cost,
                100 * entry[key]["mean"],
                100 * entry[key]["sd"],
                fmt="o",
                color=colours[name],
                capsize=4,
                label=name,
            )
        axis.set_xlabel("evaluations of f for one test example")
        axis.set_ylabel("test accuracy %")
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=7)
        axis.set_xlim(left=-1)
    axis = axes[0][2]
    for name in result["runs"]["memory"]:
        if name == "guess alone":
            continue
        groups: dict[int, list[int]] = {}
        for run in result["runs"]["memory"][name]:
            for longest, count in zip(run["single"]["longest"], run["single"]["evaluations"], strict=True):
                groups.setdefault(longest // 8 * 8, []).append(count)
        xs = sorted(x for x, counts in groups.items() if len(counts) >= 3)
        axis.plot([x + 3.5 for x in xs], [sum(groups[x]) / len(groups[x]) for x in xs], "o-", ms=4, color=colours[name])
    axis.set_xlabel("longest distance to an answer in the sequence")
    axis.set_ylabel("evaluations of f")
    axis.set_title("Memory: how long a solve takes", fontsize=10)
    return drawing


def main(argv: Sequence[str] | None = None) -> None:
    study.main(__doc__, HOME, (FULL, QUICK), compute, text, figure, argv)


if __name__ == "__main__":
    main()
