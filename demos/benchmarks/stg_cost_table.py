"""The table and its notes, from the JSON alone."""

from __future__ import annotations

from typing import Any

from demos.benchmarks.stg_cost_bars import PREDICTIONS_HELD


def table(data: dict[str, Any]) -> str:
    """The table of `stg_cost.md`, from the JSON alone."""
    head = (
        "| model | blocks | layer | plain | naive third pass | one batch of three | diffusers SLG | **ours** "
        "| analytic limit | peak memory: plain | one batch | **ours** |"
    )
    lines = [head, "|---|" + "---:|" * (head.count("|") - 2)]
    for entry in data["models"]:
        rows = entry["variants"]
        for name in ("ours", "ours_deep"):
            ours = rows[name]
            times = [rows[other]["time_to_plain"]["median"] for other in ("plain", "naive", "one_batch", "diffusers")]
            limit = ours["limit_to_naive"] * (entry["branches"] + 1) / entry["branches"]
            peaks = [rows[other]["peak_bytes"] / 2**20 for other in ("plain", "one_batch", name)]
            first = name == "ours"
            cells = [
                entry["title"] if first else "",
                str(entry["blocks"]) if first else "",
                str(ours["layer"]) + (" (preset)" if first else ""),
                *[f"{value:.2f}" if first else "" for value in times],
                f"**{ours['time_to_plain']['median']:.2f}**",
                f"{limit:.2f}",
                *[f"{value:.1f} MiB" if first else "" for value in peaks[:2]],
                f"**{peaks[2]:.1f} MiB**",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *notes(data)]) + "\n"


def notes(data: dict[str, Any]) -> list[str]:
    """How to read the table."""
    where, settings = data["machine"], data["settings"]
    device = where["gpu"] or f"{where['threads']} thread(s) of {where['cpu']}"
    widths = sorted({entry["width"] for entry in data["models"]})
    passed = {name: bar["passed"] for name, bar in data["bars"].items()}
    missed = [name for name, ok in passed.items() if not ok]
    verdict = f"missed: {', '.join(missed)}" if missed else "all hold"
    return [
        f"Time per step relative to the plain pipeline: median of {settings['rounds']} interleaved rounds, "
        f"{settings['clock']} time. Stock pipelines, random weights, released depth and head dimension, width "
        f"{', '.join(map(str, widths))}, {settings['dtype']}; {device}; torch {where['versions']['torch']}, "
        f"diffusers {where['versions']['diffusers']}. Analytic limit: blocks that must run over blocks of the plain "
        "pipeline, (2N + N − 1 − ℓ) / 2N with CFG, (N + N − 1 − ℓ) / N without; work outside the blocks is not in it. "
        "Peak memory: most bytes in tensors at once during the call, without the weights. Without CFG the batch has "
        "two rows.",
        "",
        f"Bars ({verdict}): blocks run equal the analytic count; with CFG on, time within 3 % of the limit relative to "
        "the naive third pass; peak memory no higher than the plain pipeline plus the captured streams of one block "
        f"(slack: {PREDICTIONS_HELD} predictions); guidance at scale 0 costs less than 1 %.",
    ]
