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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from transformers import CLIPModel, CLIPProcessor

from demos.skip_tuning import data
from skipguide.assets import bundled
from skipguide.vision.skip_tuning import SkipTuner
from skipguide.vision.skip_tuning.baselines import METHODS, build, linear_probe, probe_features
from skipguide.vision.skip_tuning.results import harmonic

HERE = Path(__file__).parent
SHIFTS = {"mild": 0.15, "strong": 0.3}
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
LORA_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # with AdamW, whose steps do not scale with the gradient
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2)
TEMPLATE = "a photo of a {}"
Images = tuple[list[Tensor], Tensor]


def images(classes: list[str], per_class: int, seed: int, shift: str) -> Images:
    pixels, labels = data.class_images(classes, per_class, seed, SHIFTS[shift])
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
            "base": images(data.BASE_CLASSES, self.test, 901, shift),
            "new": images(data.NEW_CLASSES, self.test, 902, shift),
            "validation": images(data.BASE_CLASSES, max(4, self.test // 2), 903, shift),
        }

    def train(self, shift: str, seed: int) -> Images:
        return images(data.BASE_CLASSES, self.shots, 10_000 + seed, shift)

    def once(self, key: str, run: Callable[[], dict[str, float]]) -> dict[str, float]:
        """A run's numbers, from the file if they are there."""
        if key not in self.result["runs"]:
            self.result["runs"][key] = run()
            partial = self.path.with_name(f".{self.path.name}.partial")
            partial.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
            os.replace(partial, self.path)
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
    pixels, labels = images(data.BASE_CLASSES[:1], 4, 5, "mild")
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


def summary(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Per shift one row per method: what was chosen, and mean and deviation over the seeds."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for shift in SHIFTS:
        zero = result["runs"][f"{shift}/zero-shot"]
        rows[shift] = [{"method": "zero-shot", "seeds": 1, "base": [zero["base"], 0.0], "new": [zero["new"], 0.0]}]
        rows[shift][0]["h"] = [harmonic(zero["base"], zero["new"]), 0.0]
        for method in ("linear probe", *METHODS):
            runs: dict[float, dict[int, Any]] = {}
            for key, run in result["runs"].items():
                parts = key.split("/")
                if parts[:2] == [shift, method]:
                    runs.setdefault(float(parts[2]), {})[int(parts[3])] = run
            best = max(
                runs,
                key=lambda rate: statistics.mean(
                    runs[rate][s]["validation"] for s in range(1, result["settings"]["grid_seeds"] + 1)
                ),
            )
            chosen = list(runs[best].values())
            row: dict[str, Any] = {"method": method, "rate": best, "edge": best in (min(runs), max(runs))}
            row |= {"seeds": len(chosen), "cpu_seconds": statistics.mean(r["cpu_seconds"] for r in chosen)}
            row["base"] = spread([r["base"] for r in chosen])
            if method != "linear probe":
                row["new"] = spread([r["new"] for r in chosen])
                row["h"] = spread([harmonic(r["base"], r["new"]) for r in chosen])
                row["grid"] = {
                    str(rate): [statistics.mean(harmonic(r["base"], r["new"]) for r in of.values()), len(of)]
                    for rate, of in sorted(runs.items())
                }
            rows[shift].append(row)
    return rows


def spread(values: list[float]) -> list[float]:
    """Mean and standard deviation."""
    return [statistics.mean(values), statistics.stdev(values) if values[1:] else 0.0]


def table(result: dict[str, Any]) -> str:
    """The study as Markdown."""
    settings = result["settings"]
    lines = [
        "# Few-shot study of Skip Tuning on tiny-clip",
        "",
        f"24 base and 24 new classes, {settings['shots']} shots, {settings['epochs']} epochs, batch 4, "
        f"{settings['test_per_class']} test images per class and group. The images are photos mixed with an unseen "
        f"rendering (mild: {SHIFTS['mild']}, strong: {SHIFTS['strong']}). Rates chosen on validation images of the "
        f"base classes ({settings['grid_seeds']} seeds per rate). Percent, mean ± standard deviation over seeds; an "
        "asterisk marks a rate at the edge of its grid. CPU seconds of one run, extraction included, on a shared "
        "machine. Saved: what one step keeps for its backward pass.",
    ]
    for shift, rows in summary(result).items():
        lines += ["", f"## {shift.capitalize()} shift", ""]
        lines += ["| method | rate | Base | New | H | CPU s | saved MB | trained | seeds |", "|---|" + "---|" * 8]
        for row in rows:
            cost = result["cost"].get(row["method"], {})
            cells = [
                row["method"],
                f"{row['rate']:g}{'*' if row['edge'] else ''}" if "rate" in row else "–",
                *(percent(row.get(part)) for part in ("base", "new", "h")),
                f"{row['cpu_seconds']:.2f}" if "cpu_seconds" in row else "–",
                f"{cost['saved_bytes'] / 1e6:.2f}" if cost else "–",
                f"{cost['trained']:,}" if cost else "–",
                str(row["seeds"]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        rates = sorted({float(rate) for row in rows for rate in row.get("grid", {})})
        lines += ["", f"H at every rate (mean; {settings['grid_seeds']} seeds, the chosen rate all of them):", ""]
        lines += [f"| method | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---|" + "---|" * len(rates)]
        for row in rows:
            if "grid" in row:
                found = {float(rate): value[0] for rate, value in row["grid"].items()}
                cells = [f"{100 * found[rate]:.1f}" if rate in found else "–" for rate in rates]
                lines.append(f"| {row['method']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def percent(value: list[float] | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value[0]:.1f}" + (f" ± {100 * value[1]:.1f}" if value[1] else "")


def figure(result: dict[str, Any], path: Path) -> None:
    """Base against New at the chosen rate, and H over the rates."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = summary(result)
    plot, axes = plt.subplots(2, len(shown), figsize=(11, 8.5), layout="constrained")
    for column, (shift, rows) in enumerate(shown.items()):
        above, below = axes[0][column], axes[1][column]
        for number, row in enumerate(row for row in rows if "new" in row):
            colour = f"C{number}"
            (base, base_sd), (new, new_sd) = row["base"], row["new"]
            above.errorbar(
                100 * base, 100 * new, 100 * new_sd, 100 * base_sd, "o", color=colour, capsize=3, label=row["method"]
            )
            if "grid" in row:
                points = sorted((float(rate), value[0]) for rate, value in row["grid"].items())
                below.plot([r for r, _ in points], [100 * h for _, h in points], "o-", color=colour)
            else:
                below.axhline(100 * row["h"][0], color=colour, linestyle=":")
        above.set(title=f"{shift} shift", xlabel="accuracy on base classes (%)", ylabel="accuracy on new classes (%)")
        below.set(xscale="log", xlabel="peak learning rate", ylabel="harmonic mean H (%)")
        for axis in (above, below):
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    plot.savefig(path, dpi=110)
    plt.close(plot)


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
    path.with_suffix(".md").write_text(table(study.result), encoding="utf-8")
    figure(study.result, path.with_suffix(".png"))
    print(table(study.result))
    print(f"{path}, {path.with_suffix('.md').name}, {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
