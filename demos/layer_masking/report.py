"""The study's tables and plots, from its numbers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from demos.benchmarks.measure import write_json, write_text
from skipguide.files import replacing
from skipguide.vision.layer_masking import FILLS

NAMES = {
    "neighbours": "**layer masking**", "zeros": "layer masking, zero fill", "partial": "layer masking, partial conv.",
    "black": "black", "grey": "grey", "mean": "mean colour", "blur": "blur (sees what is hidden)", "noise": "noise",
}  # fmt: skip
KINDS = {"plain": "trained plainly", "erasing": "trained with random erasing"}


def models_of(results: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [model for name, model in results["models"].items() if name.startswith(kind)]


def spread_of(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation over the seeds."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def over(models: list[dict[str, Any]], get: Callable[[dict[str, Any]], float]) -> str:
    return spread_of([get(model) for model in models])


def _mean(model: dict[str, Any], kind: str, fill: str, what: str, fraction: float | None = None) -> float:
    rows = [r for r in model["removal"] if r["segments"] == kind and r["fill"] == fill and r["fraction"] < 1]
    return statistics.fmean(r[what] for r in rows if fraction in (None, r["fraction"]))


def all_removed(model: dict[str, Any], fill: str) -> float:
    """Accuracy when nothing is left to see."""
    return next(r["accuracy"] for r in model["removal"] if r["fraction"] == 1 and r["fill"] == fill)


def tables(results: dict[str, Any]) -> str:
    """Markdown."""
    lines: list[str] = []
    for kind, words in KINDS.items():
        models = models_of(results, kind)
        if not models:
            continue
        seeds = f"{len(models)} seeds" if len(models) > 1 else "one model"
        lines += [
            f"## {words.capitalize()} ({seeds}, clean accuracy {over(models, lambda m: m['accuracy'])})", "",
            "Means over removed fractions 0.1 … 0.9; entropy of predicted classes (even: 2.303); share unchanged.",
            "",
            "| fill | patches: accuracy | entropy | unchanged | superpixels: accuracy | entropy | unchanged "
            "| all removed: accuracy |",
            "|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for fill in FILLS:
            cells = [NAMES[fill]]
            cells += [
                over(models, lambda m, s=segments, w=what, f=fill: _mean(m, s, f, w))
                for segments in ("patches", "superpixels")
                for what in ("accuracy", "entropy", "unchanged")
            ]
            gone = [all_removed(m, fill) for m in models]
            lines.append(f"| {' | '.join([*cells, spread_of(gone)])} |")
        lines += [
            "", "The mask's shape: the shape itself removed to the pixel (what is still right is read off the hole; "
            "chance 0.1), "
            "and the hole of another class cut beside it.", "",
            "| fill | still right without the shape | says the hole's class | keeps its own class |",
            "|---|---|---|---|",
        ]  # fmt: skip
        for number, fill in enumerate(FILLS):
            columns = ("right_without_the_shape", "says_the_hole", "keeps_its_class")
            cells = [over(models, lambda m, c=c, n=number: m["leakage"][n][c]) for c in columns]
            lines.append(f"| {NAMES[fill]} | {' | '.join(cells)} |")
        lines += [
            "", "LIME (8x8 patches): does it find the shape, and how many predictions survive the removal of its first "
            "10 % of segments "
            "(lower is better), removed by the same fill and, for all alike, by the mean colour.", "",
            "| fill | top segment on the shape | positive weight on the shape | top segments on the shape "
            "| 10 % removed, own fill | 10 % removed, mean colour |",
            "|---|---|---|---|---|---|",
        ]  # fmt: skip
        for number, row in enumerate(models[0]["lime"]):
            columns = ("points_at_the_shape", "positive_weight_on_the_shape", "top_segments_on_the_shape")
            cells = [over(models, lambda m, c=c, n=number: m["lime"][n][c]) for c in columns]
            for judge in ("own", "mean"):
                cells.append(
                    over(models, lambda m, j=judge, n=number: m["lime"][n]["accuracy_without_the_top"][j]["0.1"])
                )
            lines.append(f"| {NAMES[row['fill']]} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Curves against the removed fraction: a row per training, a column per measure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds = [kind for kind in KINDS if models_of(results, kind)]
    measures = ("accuracy", "entropy", "unchanged")
    figure, axes = plt.subplots(len(kinds), 3, figsize=(13, 3.9 * len(kinds)), squeeze=False, layout="constrained")
    for row, kind in zip(axes, kinds, strict=True):
        models = models_of(results, kind)
        for axis, what in zip(row, measures, strict=True):
            for fill in FILLS:
                rows = [[r for r in m["removal"] if r["segments"] == "patches" and r["fill"] == fill] for m in models]
                x = [r["fraction"] for r in rows[0]]
                values = [[r[what] for r in own] for own in rows]
                middle = [statistics.fmean(v) for v in zip(*values, strict=True)]
                wide = 2.6 if fill == "neighbours" else 1.2
                (line,) = axis.plot(x, middle, label=NAMES[fill].strip("*"), lw=wide, zorder=3 if wide > 2 else 2)
                if len(models) > 1:
                    low, high = ([f(v) for v in zip(*values, strict=True)] for f in (min, max))
                    axis.fill_between(x, low, high, color=line.get_color(), alpha=0.12, lw=0)
            axis.set(xlabel="removed fraction of 8x8 patches", title=f"{what}, {KINDS[kind]}")
            axis.grid(alpha=0.25)
    axes[0][0].legend(fontsize=8)
    with replacing(path) as (partial,):
        figure.savefig(partial, dpi=80)
    plt.close(figure)


def write(folder: Path, results: dict[str, Any]) -> None:
    """JSON, tables, plot."""
    write_json(folder / "results.json", results)
    write_text(folder / "results.md", tables(results) + "\n")
    plot(results, folder / "results.png")
