"""Report: the table (Markdown, CSV, JSON) and the curves (PNG) of a run, whatever of it is there."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demos.benchmarks.measure import machine, write_json, write_text
from demos.quality.summary import MEASURES
from demos.study import canvas, save_figure, shown, table
from skipguide.files import replacing

PERCENT = ("seen", "held_out", "shape")
MARKS = "os^vDP*Xph<>d"


def write(out: Path, result: dict[str, Any], correlation: Sequence[Mapping[str, Any]]) -> str:
    """Write everything; returns the Markdown."""
    result = result | {"correlation": list(correlation), "machine": machine()}
    write_json(out / "results.json", result)
    text = markdown(result)
    write_text(out / "results.md", text)
    _csv(out / "results.csv", result["rows"])
    save_figure(quality_cost(result), out / "quality_cost.png")
    save_figure(quality_diversity(result), out / "quality_diversity.png")
    return text


def markdown(result: Mapping[str, Any]) -> str:
    """The table, with the floor of real clips, what is missing, and what was found."""
    plan, rows = result["plan"], result["rows"]
    head = ["setting", "w", "cost", "Fréchet, all ↓", "Fréchet ↓", "seen", "held-out", "shape", "diversity"]
    head += ["motion", "still", "flicker", "saturation", "seeds", "against the best CFG"]

    def line(row: Mapping[str, Any]) -> list[str]:
        cells = [
            _cell(row[name], 100 if name in PERCENT else 1, 1 if name in PERCENT else 2 if name == "frechet" else 3)
            for name in MEASURES
        ]
        mark = "**" if row.get("wins") else ""
        name, seeds = f"{mark}{row['name']}{mark}", str(len(row["seeds"]))
        return [name, f"{row['w']:g}", f"{row['cost']:.2f}", f"{row['pooled']:.2f}", *cells, seeds, _verdict(row)]

    floor = [f"{result['floor'][n] * (100 if n in PERCENT else 1):.{1 if n in PERCENT else 3}f}" for n in MEASURES]
    lines = [line(row) for row in sorted(rows, key=lambda row: (row["family"], row["cost"], row["name"]))]
    text = table(head, [["real clips, other ones", "", "", "", *floor, "", ""], *lines])
    notes = [
        f"{plan['prompts']} captions x {plan['each']} clips x up to {plan['seeds']} seeds; mean ± standard deviation "
        "over seeds (Fréchet, all: of the clips of all seeds as one set, which is less biased). "
        "Cost: blocks run relative to plain CFG. Seen, held-out, shape: per cent read right by the "
        "classifier (all five attributes; the shape). Diversity, motion, still, flicker, saturation: 1 is what real "
        "clips of the same captions have (still: against the motion of moving ones). Last column: paired differences "
        f"over seeds against {result['best_cfg']} (Fréchet distance), 95 % interval. Seeds differ by more than "
        "settings: compare rows of one seed by the last column only.",
        f"On the frontier of cost and distance: {', '.join(result['frontier']) or 'none'}.",
        "Better than the best plain CFG, no less diverse, at or below its cost: "
        f"{', '.join(result['winners']) or 'no setting'}.",
    ]
    reused = [f"{row['name']} {row['reuse_error']:.0%}" for row in rows if row["reuse_error"] is not None]
    if reused:
        notes.append(f"How far a difference that was used again was off when renewed: {', '.join(reused)}.")
    if result["missing"]:
        notes.append(f"Not run (yet): {', '.join(result['missing'])}.")
    if result["correlation"]:
        notes.append("Which score of `skipguide rank` predicts a layer's gain (Spearman, bootstrap 95 % over layers):")
        notes.append(
            table(
                ["score", "rank correlation", "95 %"],
                [
                    [c["score"], f"{c['rho']:+.2f}", f"{c['low']:+.2f} to {c['high']:+.2f}"]
                    for c in result["correlation"]
                ],
            )
        )
    return text + "\n" + "\n\n".join(notes) + "\n"


def _cell(value: Mapping[str, Any], factor: float, digits: int) -> str:
    """`92.1 ± 0.4`, or without the second number where there is one seed."""
    return shown(value, factor, digits) if value["values"][1:] else f"{factor * value['mean']:.{digits}f}"


def _verdict(row: Mapping[str, Any]) -> str:
    if "frechet_difference" not in row:
        return str(row["verdict"])
    gain, half = row["frechet_difference"]
    return f"{row['verdict']}: {gain:+.1f}" + (f" ± {half:.1f}" if half is not None else "")


def _csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with replacing(path) as (partial,), partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = [f"{name}_{kind}" for name in MEASURES for kind in ("mean", "sd")]
        writer.writerow(["setting", "family", "w", "steps", "control", "cost", "seeds", "verdict", *names])
        for row in rows:
            values = [row[name][kind] for name in MEASURES for kind in ("mean", "sd")]
            first = [row[name] for name in ("name", "family", "w", "steps", "control", "cost")]
            writer.writerow([*first, len(row["seeds"]), row["verdict"], *values])


def _families(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["family"], []).append(row)
    return found


def quality_cost(result: Mapping[str, Any]) -> Any:
    """Distance and diversity over the blocks run, the frontier marked."""
    figure, axes = canvas(1, 2, width=7.0, height=5.0)
    for (family, rows), number in zip(_families(result["rows"]).items(), range(100), strict=False):
        for axis, name in zip(axes[0], ("frechet", "diversity"), strict=True):
            axis.errorbar(
                [row["cost"] for row in rows],
                [row["paired"] if name == "frechet" else row[name]["mean"] for row in rows],
                [row[name]["sd"] for row in rows],
                fmt=MARKS[number % len(MARKS)],
                ms=5,
                lw=1,
                color=f"C{number % 10}",
                mfc="none" if rows[0]["control"] else None,
                label=family,
            )
    front = [row for row in result["rows"] if row["name"] in result["frontier"]]
    front.sort(key=lambda row: row["cost"])
    axes[0][0].plot([r["cost"] for r in front], [r["paired"] for r in front], "k-", lw=0.8, label="frontier")
    for row in front:
        axes[0][0].annotate(
            row["name"], (row["cost"], row["paired"]), fontsize=7, xytext=(4, -8), textcoords="offset points"
        )
    for axis, label in zip(axes[0], ("Fréchet distance (lower is better)", "diversity (real clips: 1)"), strict=True):
        axis.axvline(1.0, color="grey", ls=":", lw=1)
        axis.set_xlabel("blocks run, relative to plain CFG")
        axis.set_ylabel(label)
    axes[0][1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def quality_diversity(result: Mapping[str, Any]) -> Any:
    """Distance against diversity: one line per family, along its scale."""
    figure, axes = canvas(1, 1, width=7.5, height=5.0)
    axis = axes[0][0]
    for (family, rows), number in zip(_families(result["rows"]).items(), range(100), strict=False):
        axis.plot(
            [row["diversity"]["mean"] for row in rows],
            [row["paired"] for row in rows],
            f"{MARKS[number % len(MARKS)]}{'' if family == 'single layers' else '-'}",
            ms=5,
            lw=0.8,
            color=f"C{number % 10}",
            label=family,
        )
    axis.set_xlabel("diversity (real clips: 1)")
    axis.set_ylabel("Fréchet distance (lower is better)")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
