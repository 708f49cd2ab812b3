"""The few-shot study: `python -m demos.skip_tuning.study` (about 10 CPU minutes; `--quick` takes less than 3).

Every method gets the same images, epochs and grid of learning rates; the rate is chosen on validation images of the
base classes with three seeds; the chosen one runs with five seeds. Runs in the JSON are not
repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from transformers import CLIPModel, CLIPProcessor

from demos.benchmarks.measure import write_json, write_text
from demos.skip_tuning import data
from demos.skip_tuning.baselines import METHODS, build, linear_probe, probe_features
from demos.skip_tuning.report import figure, table
from demos.study import save_figure
from skipguide.assets import bundled
from skipguide.vision.skip_tuning import SkipTuner

HERE = Path(__file__).parent
SHIFTS = {"mild": 0.15, "strong": 0.3}
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
LORA_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # with AdamW, whose steps do not scale with the gradient
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)
TEMPLATE = "a photo of a {}"
BASE, NEW = tuple(data.BASE_CLASSES), tuple(data.NEW_CLASSES)
Images = tuple[list[Tensor], Tensor]


@cache
def images(classes: tuple[str, ...], per_class: int, seed: int, shift: str) -> Images:
    """Every method sees the same ones, so they are drawn once."""
    pixels, labels = data.class_images(list(classes), per_class, seed, SHIFTS[shift])
    return list(pixels * 2 - 1), labels


class Study:
    """One model, both shifts, every method."""

    def __init__(self, path: Path, epochs: int, shots: int, seeds: int, grid: int, test: int) -> None:
        self.path, self.epochs, self.shots, self.seeds, self.grid, self.test = path, epochs, shots, seeds, grid, test
        clip = bundled("tiny-clip")
        self.model, self.processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
        settings = {"epochs": epochs, "shots": shots, "grid_seeds": grid, "test_per_class": test, "shifts": SHIFTS}
        self.result: dict[str, Any] = {"settings": settings, "runs": {}, "cost": {}}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["settings"] != settings:
                raise SystemExit(f"{path} holds a study with other settings: move it away")
            self.result = found

    def sets(self, shift: str) -> dict[str, Images]:
        return {
            "base": images(BASE, self.test, 901, shift),
            "new": images(NEW, self.test, 902, shift),
            "validation": images(BASE, max(4, self.test // 2), 903, shift),
        }

    def train(self, shift: str, seed: int) -> Images:
        return images(BASE, self.shots, 10_000 + seed, shift)

    def once(self, key: str, run: Callable[[], dict[str, float]]) -> dict[str, float]:
        """A run's numbers, from the file if they are there."""
        if key not in self.result["runs"]:
            self.result["runs"][key] = run()
            write_json(self.path, self.result)
        found: dict[str, float] = self.result["runs"][key]
        return found

    def score(self, tuner: SkipTuner, sets: dict[str, Images]) -> dict[str, float]:
        names = {"base": data.BASE_CLASSES, "new": data.NEW_CLASSES, "validation": data.BASE_CLASSES}
        return {part: round(tuner.evaluate(sets[part], names[part]).accuracy, 5) for part in sets}

    def zero_shot(self, shift: str) -> dict[str, float]:
        tuner = SkipTuner(self.model, self.processor, data.BASE_CLASSES, templates=TEMPLATE)
        return self.score(tuner, self.sets(shift))

    def probe(self, shift: str, seed: int, l2: float) -> dict[str, float]:
        tuner = SkipTuner(self.model, self.processor, data.BASE_CLASSES, templates=TEMPLATE)
        pixels, labels = self.train(shift, seed)
        sets = self.sets(shift)
        began = time.process_time()
        probe = linear_probe(probe_features(tuner, pixels), labels, len(data.BASE_CLASSES), l2)
        seconds = time.process_time() - began
        right = {
            part: (probe(probe_features(tuner, sets[part][0])).argmax(1) == sets[part][1]).double().mean().item()
            for part in ("base", "validation")
        }
        return {**{part: round(value, 5) for part, value in right.items()}, "cpu_seconds": round(seconds, 3)}

    def tune(self, method: str, shift: str, seed: int, rate: float) -> dict[str, float]:
        kind = METHODS[method]
        tuner = build(method, self.model, self.processor, data.BASE_CLASSES, templates=TEMPLATE)
        began = time.process_time()
        report = tuner.fit(
            self.train(shift, seed),
            epochs=self.epochs,
            lr_text=rate,
            lr_image=rate / 4 if kind.recipe else rate,
            warmup_lr=rate / 20,
            optimizer="adamw" if kind.lora else "sgd",
            homogeneous=kind.recipe,
            seed=seed,
            progress=False,
        )
        seconds = time.process_time() - began
        if method not in self.result["cost"]:
            self.result["cost"][method] = {"trained": report.trained, "saved_bytes": saved_bytes(tuner)}
        return {**self.score(tuner, self.sets(shift)), "cpu_seconds": round(seconds, 3), "kept": round(report.kept, 2)}

    def run(self) -> None:
        grid = list(range(1, self.grid + 1))
        every = list(range(1, self.seeds + 1))
        jobs: dict[str, tuple[tuple[float, ...], Callable[[str, int, float], dict[str, float]]]] = {
            "linear probe": (PENALTIES, self.probe)
        }
        for method in METHODS:
            rates = LORA_RATES if METHODS[method].lora else RATES

            def job(shift: str, seed: int, rate: float, method: str = method) -> dict[str, float]:
                return self.tune(method, shift, seed, rate)

            jobs[method] = (rates, job)
        bar = tqdm(total=len(SHIFTS) * sum(len(r) * len(grid) + len(every) - len(grid) for r, _ in jobs.values()))
        for shift in SHIFTS:
            self.once(f"{shift}/zero-shot", lambda shift=shift: self.zero_shot(shift))
            for name, (rates, job) in jobs.items():

                def one(rate: float, seed: int, name: str = name, job: Any = job, shift: str = shift) -> Any:
                    bar.set_description(f"{shift} {name} {rate:g} seed {seed}")
                    found = self.once(f"{shift}/{name}/{rate:g}/{seed}", lambda: job(shift, seed, rate))
                    bar.update()
                    return found

                means = {rate: statistics.mean(one(rate, s)["validation"] for s in grid) for rate in rates}
                best = max(means, key=lambda rate: means[rate])
                for seed in every[len(grid) :]:
                    one(best, seed)
        bar.close()


def saved_bytes(tuner: SkipTuner) -> int:
    """Bytes kept for the backward pass of one step with a batch of four, parameters not counted."""
    from skipguide.vision.skip_tuning.step import StepModule

    step = StepModule(tuner.towers, tuner.text_prefix(), tuner.image_layer, tuner.text_layer, tuner.class_skip, 1)
    pixels, labels = images(BASE[:1], 4, 5, "mild")
    with torch.no_grad():
        hidden = tuner.towers.image.prefix(torch.stack(pixels), tuner.image_layer)
    own = {p.untyped_storage().data_ptr() for p in tuner.model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step(hidden, labels)
    return sum(seen.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two seeds, one epoch, written to a temporary folder")
    parser.add_argument("--out", type=Path, default=HERE / "study.json")
    args = parser.parse_args()
    if args.quick:
        import tempfile

        path = Path(tempfile.mkdtemp(prefix="skip-tuning-study-")) / "study.json"
        study = Study(path, epochs=1, shots=4, seeds=2, grid=1, test=5)
    else:
        path = args.out
        study = Study(path, epochs=4, shots=4, seeds=5, grid=3, test=20)
    study.run()
    write_text(path.with_suffix(".md"), table(study.result))
    save_figure(figure(study.result), path.with_suffix(".png"))
    print(table(study.result))
    print(f"{path}, {path.with_suffix('.md').name}, {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
