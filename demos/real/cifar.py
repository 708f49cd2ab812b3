"""SkipNet on its paper's data: CIFAR-10, ResNet-38, gates ff1 and rnn, against its controls.

    nice -n 19 python -m demos.real.cifar                   # all runs, 40 epochs each: twelve hours of one core
    nice -n 19 python -m demos.real.cifar --form short      # 8 epochs each: two and a half hours
    nice -n 19 python -m demos.real.cifar --runs plain-38   # one of them; two minutes an epoch
    python -m demos.real.cifar --report                     # the tables and the figure, of what is done so far

Runs go in the order of `RUNS`. One that was stopped goes on from its last quarter of an epoch, in `runs/real-cifar`, or
from what is committed in `demos/real/cifar/FORM`, whichever is further. There, below 2.4 MB in all: NAME.json, what was
measured of a finished run; NAME.npz, its network, where others start from it; current.npz, the network in training as
`--report` found it (16 bits a weight, and none of the optimiser's memory: that begins anew). Two processes may share
the work with `--runs`. Images are those of `../shared/data/cifar10`; the last 2,000 of the training part choose subsets
of blocks, and figures are of the 10,000 test images. Training is in bfloat16 where the machine multiplies in it, twice
as fast; measuring in float32.

Gates are trained as in the paper, with the cross-entropy alone and then with the policy gradient; and, as that may
hardly close a gate in so few steps, with a price on all that runs beyond half of the blocks ("budget", "budget-rnn").

Controls of the gates, all trained as long: the same network without gates ("plain-38-on"); the best subset of as many
blocks, the same for all images; blocks drawn at random as often as the gates open them; both are left out where the
gates open every block. And stochastic depth (1603.09382), which is trained from the start to lose blocks.

The paper: with 110 layers about half of the computation at equal accuracy, and the number of layers follows difficulty.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tqdm import tqdm

from demos import study
from demos.benchmarks.measure import Ratio, interleaved, machine, write_json, write_text
from demos.real.pictures import data_file, jpegs
from demos.real.small_state import SmallState
from demos.real.weights import NotInstalledError
from demos.skipnet.pictures import spearman
from demos.skipnet.train import shift_and_mirror
from demos.training import fast_precision
from skipguide import find_blocks
from skipguide.vision import SkipNet
from skipguide.vision.skipnet.evaluate import Decide, Evaluation, best_subset, evaluate, fixed_gates, random_gates
from skipguide.vision.skipnet.train import TrainConfig, train
from skipguide.vision.skipnet.train_state import TrainState

HOME = Path(__file__).with_suffix("")
OUT = Path(__file__).with_suffix(".json")
WORK = study.ROOT / "runs" / "real-cifar"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
VALIDATION = 2000
MARKERS = {"o": "plain networks", "x": "controls", "D": "gates"}  # in the figure
LEARNED = ("supervised", "budget", "reinforce")  # stages that train gates
CURRENT, PROGRESS = "current.npz", "progress.json"


@dataclass(frozen=True)
class Run:
    """One network and how it is trained.

    Attributes:
        name: of the run and its folder.
        blocks: of each of the three stages; 6 is ResNet-38.
        stages: of the training, and epochs of each.
        gate: kind of the gates.
        start: name of the run whose weights it starts from.
        like: name of the gated run whose number of blocks a control has.
        survival: of stochastic depth, how often the last block runs; the others lie on the line to the first, which
            always does.
    """

    name: str
    blocks: int
    stages: tuple[tuple[str, int], ...]
    gate: str = "ff1"
    start: str = ""
    like: str = ""
    survival: float = 0.0


RUNS = (
    Run("plain-38", 6, (("dense", 40),)),
    Run("plain-26", 4, (("dense", 40),)),
    Run("plain-20", 3, (("dense", 40),)),
    Run("plain-38-on", 6, (("dense", 40),), start="plain-38"),
    Run("ff1", 6, (("supervised", 20), ("reinforce", 20)), start="plain-38"),
    Run("ff1-fixed", 6, (("fixed", 40),), start="plain-38", like="ff1"),
    Run("ff1-random", 6, (("random", 40),), start="plain-38", like="ff1"),
    Run("budget", 6, (("budget", 40),), start="plain-38"),
    Run("budget-fixed", 6, (("fixed", 40),), start="plain-38", like="budget"),
    Run("budget-random", 6, (("random", 40),), start="plain-38", like="budget"),
    Run("rnn", 6, (("supervised", 20), ("reinforce", 20)), gate="rnn", start="plain-38"),
    Run("rnn-fixed", 6, (("fixed", 40),), start="plain-38", like="rnn"),
    Run("budget-rnn", 6, (("budget", 40),), gate="rnn", start="plain-38"),
    Run("stochastic", 6, (("random", 40),), like="budget", survival=0.5),
)


def kept(run: Run, net: SkipNet) -> nn.Module:
    """What is kept of a network: all, or what is not gates where these are not trained; they can be as large."""
    gated = any(stage in LEARNED for stage, _ in run.stages)
    return net if gated else net.backbone


@dataclass(frozen=True)
class Settings:
    """What is the same for all runs; tests make it small."""

    epochs: float = 1.0  # times those of the runs
    # of training, as accelerate calls it; this study trains on the processor
    precision: str = field(default_factory=lambda: fast_precision(cpu=True))
    batch: int = 128
    lr: float = 3e-3
    widths: tuple[int, ...] = (16, 32, 64)
    train: int = 50_000
    test: int = 10_000
    timed: int = 128
    rounds: int = 7


FORMS = {"full": Settings(), "short": Settings(epochs=0.2)}


@dataclass(frozen=True)
class Images:
    """Images `[N, 3, 32, 32]` as bytes, and labels `[N]`."""

    images: Tensor
    labels: Tensor

    def __getitem__(self, rows: slice) -> Images:
        return Images(self.images[rows], self.labels[rows])

    @property
    def dataset(self) -> TensorDataset:
        return TensorDataset(self.images, self.labels)


def read(part: str, count: int) -> Images:
    """The first images of `"train"` or `"test"`, which are mixed.

    Raises:
        NotInstalledError: without `../shared/data/cifar10`.
    """
    name = f"cifar10/{part}.npz"
    with np.load(data_file(name)) as data:
        labels = torch.from_numpy(data["labels"][:count].astype(np.int64))
    pictures = (np.asarray(Image.open(io.BytesIO(jpeg))) for _, jpeg in zip(labels, jpegs(name), strict=False))
    return Images(torch.from_numpy(np.stack(list(pictures))).permute(0, 3, 1, 2).contiguous(), labels)


def normalised(images: Tensor) -> Tensor:
    """Bytes as the network takes them."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def decider(decisions: Tensor) -> Decide:
    """A subset of the blocks, or as many at random as these shares say."""
    return random_gates(decisions, 0) if decisions.is_floating_point() else fixed_gates(decisions)


@torch.no_grad()
def weaken(net: SkipNet, survival: Tensor) -> None:
    """What stochastic depth does after training: every block counts as often as it ran (section 3 of its paper)."""
    for block, share in zip(list(find_blocks(net.backbone))[1:], survival.tolist(), strict=True):
        for parameter in block.module.bn2.parameters():
            parameter.mul_(share)


def thinned(net: SkipNet, decisions: Tensor) -> nn.Module:
    """The plain network without the blocks that a subset leaves out."""
    thin = copy.deepcopy(net.backbone)
    for block, runs in zip(list(find_blocks(thin))[1:], decisions.tolist(), strict=True):
        if not runs:
            parent, _, name = block.name.rpartition(".")
            setattr(thin.get_submodule(parent), name, block.shortcut or nn.Identity())
    return thin


def augment(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The usual shifts and mirror images, of a batch of bytes."""
    return shift_and_mirror(normalised(images), labels, generator)


class Study:
    """The images, and what is trained on them."""

    def __init__(self, settings: Settings, home: Path, work: Path) -> None:
        self.settings, self.home, self.work = settings, home, work
        every = read("train", settings.train)
        held = min(VALIDATION, settings.train // 5)
        self.train, self.validation = every[:-held], every[-held:]
        self.test = read("test", settings.test)

    def result(self, name: str) -> dict[str, Any] | None:
        """What was measured of a run; None of one that is not done."""
        if not (path := self.home / f"{name}.json").exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        # in which precision it was trained is noted, and free: it follows from the machine
        wanted = json.loads(json.dumps(asdict(self.settings))) | {"precision": found["settings"]["precision"]}
        if found["settings"] != wanted:
            raise SystemExit(f"{path} was measured with other settings: take another folder, --home FOLDER")
        return found

    def finished(self, name: str) -> bool:
        """Whether a run is done."""
        return self.result(name) is not None

    def misses(self, run: Run) -> bool:
        """Whether the network is gone of a run that another one is to start from."""
        waiting = any(other.start == run.name and not self.finished(other.name) for other in RUNS)
        return waiting and not (self.home / f"{run.name}.npz").exists()

    def measured(self, name: str) -> dict[str, Any]:
        """What was measured of a run that another one needs."""
        if (found := self.result(name)) is None:
            raise SystemExit(f"run {name} is needed first: python -m demos.real.cifar --runs {name}")
        return found

    def model(self, name: str) -> SkipNet:
        """A finished run's network, where others start from it."""
        self.measured(name)
        run = next(run for run in RUNS if run.name == name)
        if not (path := self.home / f"{name}.npz").exists():
            raise SystemExit(f"the network of {name} is gone: train it again, python -m demos.real.cifar --runs {name}")
        net = self.untrained(run)
        net.gates.open_by(1.0)
        SmallState.read(path).restore(kept(run, net))
        return net.eval()

    def untrained(self, run: Run) -> SkipNet:
        """A network of random weights."""
        torch.manual_seed(0)
        shape = {"blocks": [run.blocks] * 3, "widths": list(self.settings.widths), "num_classes": 10}
        net = SkipNet(shape, run.gate, image_size=(3, 32, 32))
        return net.to(memory_format=torch.channels_last)  # a third faster on a CPU

    def build(self, run: Run) -> SkipNet:
        """The network before its first step: open gates, on the weights of the run that it starts from."""
        net = self.untrained(run)
        if run.start:
            net.backbone.load_state_dict(self.model(run.start).backbone.state_dict())
        net.gates.open_by(1.0)
        return net

    def run(self, run: Run) -> None:
        """Train what is not trained yet; measure; leave the weights and the figures in the home folder."""
        if self.finished(run.name) and not self.misses(run):
            return
        net, decisions = self.build(run), self.decisions(run)
        first = self.go_on(run, net, decisions)
        for at in range(first, len(run.stages)):
            train(
                net, self.train.dataset, self.config(run, at), out=self.folder(run, at), augment=augment,
                decisions=decisions, accelerator=Accelerator(cpu=True, mixed_precision=self.settings.precision),
            )  # fmt: skip
        network = SmallState.of(kept(run, net).state_dict(), run.name)
        network.restore(kept(run, net))  # what is measured is what is kept
        if any(run.name == other.start for other in RUNS):
            network.write(self.home / f"{run.name}.npz")
        write_json(self.home / f"{run.name}.json", self.measure(run, net, decisions))  # last: it says that it is done
        shutil.rmtree(self.work / run.name, ignore_errors=True)

    def folder(self, run: Run, at: int) -> Path:
        """Of a stage's state."""
        return self.work / run.name / f"{at}-{run.stages[at][0]}"

    def epoch(self) -> int:
        """Steps of one."""
        return max(1, len(self.train.labels) // self.settings.batch)

    def config(self, run: Run, at: int) -> TrainConfig:
        """Of a stage."""
        stage, epochs = run.stages[at]
        own = {
            "reinforce": {"lr": self.settings.lr / 5, "sharpen": 3.0, "rl_weight": 1.0},
            "budget": {"budget_target": 0.5},
        }
        settings: dict[str, Any] = {"lr": self.settings.lr, **own.get(stage, {})}
        steps = max(1, round(epochs * self.settings.epochs * len(self.train.labels) / self.settings.batch))
        return TrainConfig(
            stage=stage,
            steps=steps,
            batch_size=self.settings.batch,
            alpha=0.1,
            save_every=max(1, self.epoch() // 4),
            **settings,
        )  # type: ignore[arg-type]

    # -- going on

    def go_on(self, run: Run, net: SkipNet, decisions: Tensor | None) -> int:
        """The stage to begin with; where what is committed is further than the folder of work, that is put there."""
        small = SmallState.read(self.home / CURRENT) if (self.home / CURRENT).exists() else None
        own = self.reached(run)
        if small is None or small.run != run.name or (own is not None and own >= (small.stage, small.step)):
            return 0
        small.restore(kept(run, net))
        folder = self.folder(run, small.stage)
        shutil.rmtree(folder, ignore_errors=True)
        blocks = None if decisions is None else decisions.tolist()
        state = TrainState(net, self.config(run, small.stage), blocks, folder, resume=True, main=True)
        state.step = small.step
        state.save()
        return small.stage

    def reached(self, run: Run) -> tuple[int, int] | None:
        """Stage and step of a run in the folder of work."""
        for at in reversed(range(len(run.stages))):
            if (path := self.folder(run, at) / "state.pt").exists():
                return at, int(torch.load(path, map_location="cpu", weights_only=True)["step"])
        return None

    def bring(self) -> None:
        """Write the network in training, and how far it is, into the home folder."""
        run = next((run for run in RUNS if not self.finished(run.name) and self.reached(run) is not None), None)
        if run is None:
            return
        at, _ = self.reached(run) or (0, 0)
        found = torch.load(self.folder(run, at) / "state.pt", map_location="cpu", weights_only=True)
        net = self.untrained(run)
        net.load_state_dict(found["net"])
        small = SmallState.of(kept(run, net).state_dict(), run.name, at, found["step"])
        small.restore(kept(run, net))
        mode = "hard" if run.stages[at][0] in LEARNED else "open"
        decide = None if found["decisions"] is None else decider(torch.tensor(found["decisions"]))
        held = evaluate(net.eval(), normalised(self.validation.images), self.validation.labels, mode, decide)
        last = found["history"][-self.epoch() :]
        small.write(self.home / CURRENT)
        write_json(self.home / PROGRESS, {
            "run": run.name, "stage": run.stages[at][0], "step": found["step"], "steps": self.config(run, at).steps,
            "epochs": found["step"] / self.epoch(), "of_epochs": run.stages[at][1],
            "training_accuracy_last_epoch": sum(row["accuracy"] for row in last) / max(1, len(last)),
            "validation": held.to_dict(),
        })  # fmt: skip

    def decisions(self, run: Run) -> Tensor | None:
        """What a control is trained with: a subset of the blocks, or how often each of them runs."""
        if run.survival:
            depth = 3 * run.blocks
            return 1 - (1 - run.survival) * torch.arange(2, depth + 1) / depth
        if not run.like:
            return None
        if run.stages[0][0] == "random":
            return torch.tensor(self.measured(run.like)["rates"])
        return self.subset(run, self.model(run.start))

    def subset(self, run: Run, net: SkipNet) -> Tensor:
        """The best blocks for all images, as many as a gated run has on average, rounded up."""
        gates = self.measured(run.like)["hard"]["blocks"]
        some = self.validation[:300]
        return best_subset(net, normalised(some.images), some.labels, math.ceil(gates - 1 - 1e-9))

    # -- measuring

    def measure(self, run: Run, net: SkipNet, decisions: Tensor | None) -> dict[str, Any]:
        """Accuracy, computation and time on the test images."""
        gated, more = run.stages[-1][0] in LEARNED, {}
        decide = None if decisions is None else decider(decisions)
        if run.survival and decisions is not None:
            kept = fixed_gates(self.subset(run, net))
            more = {"subset": self.evaluate(net, "open", kept).to_dict()}
            weaken(net, decisions)
            decide = None
        hard = self.evaluate(net, "hard" if gated else "open", decide)
        found = {
            "run": asdict(run),
            "settings": asdict(self.settings),
            "macs_of_all_blocks": net.costs().dense,
            "hard": hard.to_dict(),
            "time": self.time(run, net, decisions),
            **more,
        }
        if not gated:  # they have no gates, which the network that measures them runs all the same
            for own in (found["hard"], *more.values()):
                own["macs_fraction"] -= sum(net.costs().gates) / net.costs().dense
        if gated:
            rates = hard.gates.double().mean(0)
            found |= {
                "per_class": hard.per_class(self.test.labels),
                "rates": rates.tolist(),
                "sampled": self.evaluate(net, "sample").to_dict(),
                "random_gates": self.evaluate(net, "hard", random_gates(rates, 0)).to_dict(),
                # what the paper calls difficulty: does the network that runs all blocks say less sure what it sees?
                "blocks_with_difficulty": self.follows_difficulty(run, hard),
            }
        return found

    def evaluate(self, net: SkipNet, mode: str, decide: Any = None) -> Evaluation:
        return evaluate(net, normalised(self.test.images), self.test.labels, mode, decide)

    def follows_difficulty(self, run: Run, found: Evaluation) -> float | None:
        """Rank correlation of an image's blocks with its difficulty; None where all images have as many."""
        if len(found.blocks.unique()) == 1:
            return None
        return spearman(self.difficulty(self.model(run.start)), found.blocks)

    @torch.inference_mode()
    def difficulty(self, net: SkipNet) -> Tensor:
        """Of every test image, the loss of the network with all blocks."""
        parts = [net(images, return_routing=True, mode="open").logits for images in self.batches(250)]
        return torch.nn.functional.cross_entropy(torch.cat(parts), self.test.labels, reduction="none")

    def batches(self, size: int) -> Iterator[Tensor]:
        """The test images."""
        return (normalised(part) for part in self.test.images.split(size))

    @torch.inference_mode()
    def time(self, run: Run, net: SkipNet, decisions: Tensor | None) -> dict[str, Any] | None:
        """Process time of a batch over the plain ResNet-38's; None of blocks at random, which nobody would run."""
        images = next(self.batches(self.settings.timed))
        plain = self.untrained(RUNS[0]).eval().backbone
        if run.stages[-1][0] in LEARNED:
            runs = {"own": lambda: net(images)}
        elif decisions is None or run.survival:
            runs = {"own": lambda: net.backbone(images)}
        elif decisions.is_floating_point():
            return None
        else:
            thin = thinned(net, decisions)
            runs = {"own": lambda: thin(images)}
        runs["plain"] = lambda: plain(images)
        now = [runs["plain"]]

        @contextmanager
        def select(name: str) -> Iterator[None]:
            now[0] = runs[name]
            yield

        turns = {name: (lambda name=name: select(name)) for name in runs}
        rounds = list(interleaved(turns, lambda: now[0](), self.settings.rounds))
        return Ratio.of(*([clocks[name][1] for clocks in rounds] for name in ("own", "plain"))).to_dict()


# -- results


def results(home: Path) -> dict[str, Any]:
    """What the finished runs have measured, in order."""
    paths = [home / f"{run.name}.json" for run in RUNS]
    done = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    now = json.loads((home / PROGRESS).read_text(encoding="utf-8")) if (home / PROGRESS).exists() else None
    by_name = {found["run"]["name"]: found for found in done}
    left = [run for run in RUNS if run.name not in by_name]
    waiting = [run.name for run in left if not is_plain(run, by_name.get(run.like))]
    return {
        "settings": done[0]["settings"] if done else None,
        "runs": done,
        "in_training": now if now and now["run"] in waiting else None,
        "waiting": waiting,
        "are_plain_38_on": [run.name for run in left if run.name not in waiting],
    }


def is_plain(run: Run, gated: dict[str, Any] | None) -> bool:
    """Whether a control is the plain network, trained on: the gates that it follows open all blocks for all images."""
    return gated is not None and not run.survival and gated["hard"]["blocks_fraction"] == 1


def text(result: dict[str, Any]) -> str:
    """The table."""
    base = next((run for run in result["runs"] if run["run"]["name"] == "plain-38"), None)
    epochs = 40 * (result["settings"] or asdict(Settings()))["epochs"]
    rows = []
    for found in result["runs"]:
        scale = found["macs_of_all_blocks"] / base["macs_of_all_blocks"] if base else 1.0
        hard, time = found["hard"], found["time"]
        rows.append([
            found["run"]["name"], f"{hard['accuracy']:.2%}", f"{hard['blocks']:.1f}",
            f"{scale * hard['macs_fraction']:.1%}", f"{time['median']:.2f}" if time else "",
            f"{found['random_gates']['accuracy']:.2%}" if "random_gates" in found else "",
            "" if found.get("blocks_with_difficulty") is None else f"{found['blocks_with_difficulty']:+.2f}",
        ])  # fmt: skip
        if fewer := found.get("subset"):
            rows.append([
                f"{found['run']['name']}, best subset", f"{fewer['accuracy']:.2%}", f"{fewer['blocks']:.1f}",
                f"{scale * fewer['macs_fraction']:.1%}", "", "", "",
            ])  # fmt: skip
    head = [
        "run", "test accuracy", "blocks", "MACs of ResNet-38's", "time of ResNet-38's", "its gates at random",
        "blocks with difficulty",
    ]  # fmt: skip
    return (
        f"CIFAR-10, 10,000 test images, one seed, {epochs:g} epochs each\n\n"
        + (study.table(head, rows) if rows else "")
        + progress(result)
    )


def progress(result: dict[str, Any]) -> str:
    """What is not done yet, or need not be."""
    now, lines = result["in_training"], []
    if same := result["are_plain_38_on"]:
        lines.append(f"Not trained: {', '.join(same)}, whose gates open every block, so that they are plain-38-on.")
    if result["waiting"]:
        lines.append(f"Not done yet: {', '.join(result['waiting'])}.")
    if not lines:
        return ""
    if now:
        held = now["validation"]
        lines.append(
            f"In training: {now['run']}, {now['stage']}, {now['epochs']:.1f} of {now['of_epochs']} epochs: right on "
            f"{now['training_accuracy_last_epoch']:.1%} of the augmented training images of the last epoch, on "
            f"{held['accuracy']:.1%} of the 2,000 validation images with {held['blocks']:.1f} blocks."
        )
    return "\n" + " ".join(lines) + "\n"


def figure(result: dict[str, Any]) -> Any:
    """Accuracy against the computation that is really done."""
    drawing, axes = study.canvas(1, 1, 6.0, 4.2)
    (axis,) = axes.flat
    base = max((run["macs_of_all_blocks"] for run in result["runs"]), default=1)
    for found in result["runs"]:
        name = found["run"]["name"]
        for label, own in ((name, found["hard"]), (f"{name}, best subset", found.get("subset"))):
            if own is None:
                continue
            x = found["macs_of_all_blocks"] / base * own["macs_fraction"]
            marker = "o" if name.startswith("plain") else ("D" if "rates" in found else "x")
            axis.plot(100 * x, 100 * own["accuracy"], marker, color=f"C{[*MARKERS].index(marker)}")
            # these stand beside a subset of as many blocks
            shift = (5, -10) if "random" in label else (-20, 9) if label == "budget-rnn" else (5, 4)
            axis.annotate(label, (100 * x, 100 * own["accuracy"]), shift, textcoords="offset points", fontsize=8)
    for place, (marker, name) in enumerate(MARKERS.items()):
        axis.plot([], [], marker, color=f"C{place}", label=name)
    axis.legend(frameon=False, fontsize=8)
    axis.set(xlabel="% of ResNet-38's MACs", ylabel="test accuracy %", title="CIFAR-10: routing and its controls")
    return drawing


def report(home: Path, out: Path) -> str:
    """Write the JSON, the table and the figure of what is done."""
    result = results(home)
    table = text(result)
    write_json(out, {**result, "machine": machine()})
    write_text(out.with_suffix(".md"), table)
    if result["runs"]:
        study.save_figure(figure(result), out.with_suffix(".png"))
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [run.name for run in RUNS]
    parser.add_argument("--runs", nargs="+", choices=names, default=names, help="which, in the order of the list")
    parser.add_argument("--form", choices=FORMS, default="full", help="how many epochs (default: %(default)s, 40)")
    parser.add_argument("--home", type=Path, help="folder of what finished runs leave (default: demos/real/cifar/FORM)")
    parser.add_argument("--work", type=Path, help="folder of states of runs that are not finished")
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON of all finished runs; table and figure beside")
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    try:
        plan = Study(FORMS[args.form], args.home or HOME / args.form, args.work or WORK / args.form)
    except NotInstalledError as error:
        raise SystemExit(str(error)) from error
    for run in tqdm([] if args.report else [run for run in RUNS if run.name in args.runs], desc="runs"):
        if not is_plain(run, plan.result(run.like) if run.like else None):
            plan.run(run)
    plan.bring()
    print(report(plan.home, args.out))


if __name__ == "__main__":
    main()
