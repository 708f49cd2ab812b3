"""Work: one item is a setting with a seed. Each has a file of its own, so a run that was stopped goes on, and any
number of processes, now or later, share what is left."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from demos.bundled_model.autoencoder import FRAMES
from demos.bundled_model.classifier import AttributeClassifier
from demos.bundled_model.clips import ClipSpec, caption, render
from demos.bundled_model.common import atomically, contact_sheet
from demos.quality.measures import read
from demos.quality.sampling import Sampler, prompts
from demos.quality.settings import LAYER, Setting

SHOWN = 6  # clips on a contact sheet
REAL = "real"
REAL_EACH = 16  # real clips per caption: a reference whose own sampling hardly adds to a distance


@dataclass(frozen=True)
class Plan:
    """The size of a run; a folder holds one.

    Attributes:
        prompts: different captions.
        each: clips per caption and seed.
        seeds: of the noise.
        layer: that the scale grids skip.
        steps: of every sampler, for tests; None is each setting's own.
        draw: of captions and noise; another one confirms what the first one found.
    """

    prompts: int = 96
    each: int = 2
    seeds: int = 3
    layer: int = LAYER
    steps: int | None = None
    draw: int = 0

    def specs(self, each: int | None = None) -> list[ClipSpec]:
        """What the clips show, `each` of every caption."""
        return prompts(self.prompts, each or self.each, self.draw)


@dataclass(frozen=True)
class Item:
    """A setting with a seed."""

    setting: Setting
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.setting.name}.seed{self.seed}"


def items(settings: Sequence[Setting], seeds: int) -> list[Item]:
    """All work, the most worth having first: by tier, then seed."""
    return [
        Item(setting, seed)
        for tier in sorted({setting.tier for setting in settings})
        for seed in range(seeds)
        for setting in settings
        if setting.tier == tier and (seed == 0 or not setting.once)
    ]


def done(folder: Path, name: str) -> bool:
    """Whether an item's files are there; the JSON is written last."""
    return (folder / f"{name}.json").exists()


def fix_plan(folder: Path, plan: Plan) -> None:
    """Note the size of the run in its folder, or refuse a folder with another one.

    Raises:
        ValueError: if the folder's results are of another size.
    """
    path, own = folder / "plan.json", plan.__dict__
    if not path.exists():
        atomically(path, lambda partial: partial.write_text(json.dumps(own)))
    found = json.loads(path.read_text())
    if found != own:
        raise ValueError(f"{folder} holds a run of {found}, which cannot be mixed with {own}: choose another --out")


@contextmanager
def claimed(folder: Path, name: str) -> Iterator[bool]:
    """Whether an item is ours while the block runs; a process that dies lets go of it."""
    locks = folder / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield not done(folder, name)


def work(folder: Path, todo: Sequence[Item], plan: Plan, weak: Path | None, batch: int = 8) -> int:
    """Do what nobody else does until nothing is left; returns how many items that was."""
    torch.set_num_threads(1)
    classifier = AttributeClassifier.load()
    sampler: Sampler | None = None
    finished = 0
    if not done(folder, REAL):
        with claimed(folder, REAL) as mine:
            if mine:
                _real(folder, classifier, plan)
    for item in todo:
        if done(folder, item.name) or (item.setting.control == "weak" and weak is None):
            continue
        with claimed(folder, item.name) as mine:
            if mine:
                sampler = sampler or Sampler(weak=weak, layer=plan.layer, batch=batch)
                _one(folder, item, sampler, classifier, plan)
                finished += 1
    return finished


def _one(folder: Path, item: Item, sampler: Sampler, classifier: AttributeClassifier, plan: Plan) -> None:
    specs = plan.specs()
    clips = sampler.make(item.setting, specs, item.seed + 100 * plan.draw, plan.steps)
    if not torch.isfinite(clips.pixels).all():
        raise ValueError(f"{item.name}: a clip is not finite")
    if item.seed == 0:
        rows = [(caption(specs[i]), clips.pixels[i]) for i in range(0, len(specs), max(1, len(specs) // SHOWN))]
        contact_sheet(folder / f"{item.setting.name}.png", rows[:SHOWN], frames=6)
    found = read(classifier, clips.pixels, specs)
    record = item.setting.to_dict() | {
        "seed": item.seed,
        "clips": len(specs),
        "cost": clips.cost,
        "seconds_per_clip": round(clips.seconds, 3),
        "stats": clips.stats,
    }
    _write(folder, item.name, found, record)


def _real(folder: Path, classifier: AttributeClassifier, plan: Plan) -> None:
    """Real clips of the same captions: a large set as the reference, and one of a setting's size as the floor."""
    found: dict[str, Tensor] = {}
    for part, seed, each in (("", 810_000, REAL_EACH), ("floor_", 1_820_000, plan.each)):
        specs = plan.specs(each)
        pieces = [
            read(classifier, render(specs[at : at + 32], seed + at, FRAMES), specs[at : at + 32])
            for at in range(0, len(specs), 32)
        ]
        found |= {part + name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    _write(folder, REAL, found, {"clips": plan.prompts * REAL_EACH})


def _write(folder: Path, name: str, arrays: dict[str, Tensor], record: dict[str, Any]) -> None:
    def save(partial: Path) -> None:
        with partial.open("wb") as file:
            np.savez_compressed(file, **{key: value.numpy() for key, value in arrays.items()})

    atomically(folder / f"{name}.npz", save)
    text = json.dumps(record | {"process": os.getpid()}, indent=1)
    atomically(folder / f"{name}.json", lambda partial: partial.write_text(text))


def read_arrays(folder: Path, name: str) -> dict[str, Tensor]:
    """What an item left."""
    with np.load(folder / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}
