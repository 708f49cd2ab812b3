"""The figures of the study."""

from __future__ import annotations

from typing import Any

import torch

from demos import study
from demos.skipnet.data import Split
from demos.skipnet.pictures import draw_blocks_against, draw_by_blocks


def figure(result: dict[str, Any]) -> Any:
    """Accuracy against compute, and accuracy and blocks against difficulty, for every task."""
    tasks = result["tasks"]
    drawing, axes = study.canvas(len(tasks), 3)
    for row, (name, task) in zip(axes, tasks.items(), strict=True):
        _trade(row[0], name, task)
        _difficulty(row[1], row[2], task)
    return drawing


def _trade(axis: Any, name: str, task: dict[str, Any]) -> None:
    def points(found: list[dict[str, Any]], label: str, style: str, **more: Any) -> None:
        axis.errorbar(
            [100 * f["macs_fraction"]["mean"] for f in found],
            [100 * f["accuracy"]["mean"] for f in found],
            [100 * f["accuracy"]["sd"] for f in found],
            fmt=style,
            capsize=3,
            label=label,
            **more,
        )

    gated = task["gated"]
    priced = [found for found in gated.values() if "controls" in found]
    points([*task["smaller"].values(), task["dense"]], "ungated networks", "s-", color="0.5")
    points(priced, "gates, priced", "o", color="C3", ms=8)
    for style, (control, color) in zip(
        ("v", "^", "D"), {"random": "C1", "fixed": "C0", "fixed, trained on": "C2"}.items(), strict=True
    ):
        points([found["controls"][control] for found in priced], f"control: {control}", style, color=color)
    other = [found for found in gated.values() if "controls" not in found]
    points(other, "supervised, RL", "x", color="C4")
    axis.set_title(name, fontsize=10)
    axis.set_xlabel("MACs, % of the dense network")
    axis.set_ylabel("test accuracy %")
    axis.legend(fontsize=7)


def _difficulty(left: Any, right: Any, task: dict[str, Any]) -> None:
    for at, (name, found) in enumerate(task["gated"].items()):
        parts = found["by_difficulty"]
        xs = [part["difficulty"]["mean"] for part in parts]
        for axis, key, factor in ((left, "accuracy", 100), (right, "blocks", 1)):
            values = [factor * part[key]["mean"] for part in parts]
            errors = [factor * part[key]["sd"] for part in parts]
            axis.errorbar(xs, values, errors, fmt="o-", capsize=3, color=f"C{at}", label=name)
    for axis, label in ((left, "test accuracy %"), (right, "blocks run")):
        axis.set_xlabel("difficulty (steps of the wire; noise of the digit)")
        axis.set_ylabel(label)
    right.legend(fontsize=7)


def pictures(examples: Split, task: dict[str, Any]) -> Any:
    """Images sorted by blocks used, and blocks used against difficulty, scale and saliency: the first seed."""
    name = [name for name, found in task["gated"].items() if "controls" in found][-1]
    of = task["gated"][name]["first_seed"]["images"]
    blocks = torch.tensor(of["blocks"])
    drawing, axes = study.canvas(3, 8, 1.9, 1.9)
    notes = [f"{int(steps)} steps" for steps in of["difficulty"]]
    draw_by_blocks(axes[:2].ravel(), examples.images, blocks, notes)
    grid = axes[2, 0].get_gridspec()
    for axis in axes[2]:
        axis.remove()
    spans = (slice(0, 3), slice(3, 5), slice(5, 8))
    for span, key, label in zip(
        spans, ("difficulty", "ink", "saliency"), ("steps of the wire", "bright pixels", "saliency"), strict=True
    ):
        draw_blocks_against(drawing.add_subplot(grid[2, span]), torch.tensor(of[key]), blocks, label)
    drawing.suptitle(f"wires, {name}: from the fewest blocks run to the most", fontsize=10)
    return drawing
