"""The figure and the tables of llm_quality.json."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from demos.benchmarks.measure import write_text

# method -> (colour, drawn with the compensating scales)
DRAWN = {
    "AdaSkip": ("#1b6ca8", True),
    "AdaSkip, cost-aware": ("#d1495b", True),
    "AdaSkip, attention": ("#2e8b57", True),
    "AdaSkip, MLP": ("#8e6bbf", True),
    "measured damage": ("#222222", True),
    "block influence": ("#e08e2b", False),
    "Unified, balanced": ("#17a2b8", False),
    "Unified, reference": ("#7ec8d3", False),
    "late layers": ("#8c6d4f", False),
    "late attention": ("#c0a98e", False),
    "random sublayers": ("#bbbbbb", False),
    "random, ends kept": ("#777777", False),
}
TABLE = (2, 4, 6, 8, 12)
Rows = list[dict[str, Any]]


def report(path: Path) -> None:
    """Write the figure and the Markdown next to the JSON."""
    data = json.loads(path.read_text(encoding="utf-8"))
    figure(data, path.with_suffix(".png"))
    write_text(path.with_suffix(".md"), "\n".join([*table(data), "", *compensation(data), "", *decoding(data)]) + "\n")


def points(rows: Rows, method: str, compensate: bool) -> dict[int, Rows]:
    """Count -> the rows of a method; several where there are seeds."""
    found: dict[int, Rows] = defaultdict(list)
    for row in rows:
        if row["method"] == method and row["compensate"] == compensate:
            found[row["count"]].append(row)
    return dict(sorted(found.items()))


def mean(rows: Rows, key: str) -> float:
    """The mean; of perplexities the geometric one, which is that of the mean loss."""
    if key == "perplexity":
        return statistics.geometric_mean(row[key] for row in rows)
    return statistics.mean(row[key] for row in rows)


def band(rows: Rows, key: str) -> tuple[float, float]:
    """Mean minus and plus one standard deviation; of perplexities that of the loss."""
    middle = mean(rows, key)
    if len(rows) < 2:
        return middle, middle
    if key == "perplexity":
        factor = math.exp(statistics.stdev(math.log(row[key]) for row in rows))
        return middle / factor, middle * factor
    spread = statistics.stdev(row[key] for row in rows)
    return middle - spread, middle + spread


def figure(data: dict[str, Any], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    total = 2 * data["model"]["layers"]
    full = data["prefill"][0]
    plots, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained", sharex="col", sharey="row")
    for method, (colour, compensate) in DRAWN.items():
        found = points(data["prefill"], method, compensate)
        for column, share in enumerate((lambda r: r["count"] / total, lambda r: r["time_share"])):
            for line, key in enumerate(("perplexity", "agreement")):
                start = full[key] if key == "perplexity" else 1.0
                found_band = {n: band(rows, key) for n, rows in found.items()}
                pairs = [(0.0, start, start, start)]
                pairs += [(mean_of(share, rows), mean(rows, key), *found_band[n]) for n, rows in found.items()]
                x, y, low, high = zip(*sorted(pairs), strict=True)
                axis = axes[line, column]
                ours = method.startswith("AdaSkip")
                style = "-" if ours else ":" if method == "measured damage" else "--"
                axis.plot(x, y, style, color=colour, marker="o", ms=3.2, lw=1.8 if ours else 1.3, label=method)
                if method == "random, ends kept":
                    axis.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    axes[0, 0].set_yscale("log")
    top = full["perplexity"]
    axes[0, 0].set_ylim(0.95 * top, 12 * top)
    ticks = [round(top * factor) for factor in (1, 1.5, 2, 3, 5, 10)]
    axes[0, 0].set_yticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes[0, 0].minorticks_off()
    axes[0, 0].set_ylabel("perplexity per token (log)")
    axes[1, 0].set_ylabel("same most likely token as the whole model")
    axes[1, 0].set_xlabel("share of the sublayers left out")
    axes[1, 1].set_xlabel("share of the sublayers' time left out")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.set_xlim(0, 0.52)
    axes[0, 0].legend(frameon=False, fontsize=8.5)
    layers, windows = data["model"]["layers"], data["text"]["held_out_windows"]
    plots.suptitle(
        f"Leaving sublayers out of the bundled {layers}-layer language model ({windows} held-out windows)", fontsize=12
    )
    plots.savefig(out, dpi=110)
    plt.close(plots)


def mean_of(value: Callable[[dict[str, Any]], float], rows: Rows) -> float:
    return statistics.mean(map(value, rows))


def number(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else "over 1000"


def cell(rows: Rows) -> str:
    """Perplexity and agreement of one method at one count, with the spread over seeds."""
    text = number(mean(rows, "perplexity"))
    if len(rows) > 1:
        low, high = band(rows, "perplexity")
        text += f" ({low:.0f} to {high:.0f})"
    return f"{text} / {mean(rows, 'agreement'):.0%}"


def table(data: dict[str, Any]) -> list[str]:
    """Perplexity / top-1 agreement by method and count."""
    total = 2 * data["model"]["layers"]
    whole = data["prefill"][0]["perplexity"]
    lines = [
        f"Perplexity per token / top-1 agreement with the whole model, whose perplexity is {whole:.1f}.",
        "",
        "| method | " + " | ".join(f"{count} of {total}" for count in TABLE) + " |",
        "|---|" + "---|" * len(TABLE),
    ]
    for method, (_, compensate) in DRAWN.items():
        found = points(data["prefill"], method, compensate)
        label = method + (" + scale" if compensate else "")
        lines.append(f"| {label} | " + " | ".join(cell(found[n]) if n in found else "" for n in TABLE) + " |")
    return lines


def compensation(data: dict[str, Any]) -> list[str]:
    """What the scales change: perplexity without and with them, the same sets."""
    total = 2 * data["model"]["layers"]
    lines = [
        "Perplexity without → with the compensating scales, the same sublayers left out.",
        "",
        "| method | " + " | ".join(f"{count} of {total}" for count in TABLE) + " |",
        "|---|" + "---|" * len(TABLE),
    ]
    for method in DRAWN:
        if method.startswith("random"):
            continue
        off, on = (points(data["prefill"], method, compensate) for compensate in (False, True))
        cells = [
            f"{number(mean(off[n], 'perplexity'))} → {number(mean(on[n], 'perplexity'))}" if n in on else ""
            for n in TABLE
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def decoding(data: dict[str, Any]) -> list[str]:
    """Token by token, the prompt read by the whole model."""
    found: dict[tuple[str, int], Rows] = defaultdict(list)
    for row in data["decode"]:
        found[row["method"], row["count"]].append(row)
    lines = [
        "Decoding after a prompt that the whole model read.",
        "",
        "| method | sublayers asked for | left out, mean | perplexity | agreement |",
        "|---|---|---|---|---|",
    ]
    for (method, count), rows in sorted(found.items(), key=lambda item: (item[0][1], item[0][0])):
        lines.append(
            f"| {method} | {count} | {mean(rows, 'skipped'):.1%} | {number(mean(rows, 'perplexity'))} | "
            f"{mean(rows, 'agreement'):.0%} |"
        )
    return lines
