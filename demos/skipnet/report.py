"""The table of the study, and what it says: written from the figures, whatever they are."""

from __future__ import annotations

from typing import Any

from demos import study


def text(result: dict[str, Any]) -> str:
    """Markdown: one table per task, and one line per comparison."""
    seeds = len(result["settings"]["seeds"])
    parts = []
    for name, task in result["tasks"].items():
        rows: list[list[str]] = [_row("dense network", task["dense"])]
        for blocks, found in task["smaller"].items():
            rows.append(_row(f"ungated, {blocks} blocks, trained as long", found))
        for stage, found in task["gated"].items():
            rows.append(_row(f"**gates: {stage}**, p > 0.5", found))
            rows.append(_row("&nbsp;&nbsp;the same, sampled gates", found["sampled"]))
            for control, values in found.get("controls", {}).items():
                if control != "smaller network":
                    rows.append(_row(f"&nbsp;&nbsp;control: {control}", values))
        parts.append(
            f"**{name}** ({seeds} seeds, mean ± sd)\n\n"
            + study.table(["", "accuracy %", "blocks run", "MACs % of dense"], rows)
            + "\n"
            + "\n".join(verdicts(task))
            + "\n"
        )
    return "\n".join(parts)


def _row(name: str, found: dict[str, Any]) -> list[str]:
    return [
        name,
        study.shown(found["accuracy"], 100),
        study.shown(found["blocks"]),
        study.shown(found["macs_fraction"], 100, 0),
    ]


def verdicts(task: dict[str, Any]) -> list[str]:
    """For every priced network, how it stands to each control."""
    lines = []
    for stage, found in task["gated"].items():
        for control, values in found.get("controls", {}).items():
            gap = values["gated_minus_control"]
            signs = [value > 0 for value in gap["values"]]
            said = "better in every seed" if all(signs) else "no better in any seed" if not any(signs) else "mixed"
            lines.append(
                f"- {stage} against {control}: {100 * gap['mean']:+.1f} ± {100 * gap['sd']:.1f} points at "
                f"{100 * found['macs_fraction']['mean']:.0f} % against {100 * values['macs_fraction']['mean']:.0f} % "
                f"of the MACs; {said}."
            )
        correlation = found["blocks_with_difficulty"]
        lines.append(f"- {stage}: rank correlation of blocks run with difficulty {study.shown(correlation, 1, 2)}.")
    return lines
