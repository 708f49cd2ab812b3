"""The study's runs as a table and a figure."""

from __future__ import annotations

import statistics
from typing import Any

from demos.skip_tuning.baselines import METHODS
from demos.study import canvas
from skipguide.vision.skip_tuning.results import harmonic


def summary(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Per shift one row per method: what was chosen, and mean and deviation over the seeds."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for shift in result["settings"]["shifts"]:
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
    shifts = settings["shifts"]
    lines = [
        "# Few-shot study of Skip Tuning on tiny-clip",
        "",
        f"24 base and 24 new classes, {settings['shots']} shots, {settings['epochs']} epochs, batch 4, "
        f"{settings['test_per_class']} test images per class and group. The images are photos mixed with an unseen "
        f"rendering (mild: {shifts['mild']}, strong: {shifts['strong']}). Rates chosen on validation images of the "
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


def figure(result: dict[str, Any]) -> Any:
    """Base against New at the chosen rate, and H over the rates."""
    shown = summary(result)
    plot, axes = canvas(2, len(shown), 5.5, 4.25)
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
    return plot
