"""A model's entry of the JSON: its measurements against the plain pipeline and the naive third pass."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch

from demos.benchmarks.measure import Ratio
from demos.benchmarks.stg_cost_bars import bars
from demos.benchmarks.stg_cost_blocks import analytic_limit
from demos.benchmarks.stg_cost_subject import Subject


def entry_of(subject: Subject, found: dict[str, dict[str, Any]], clock: str) -> dict[str, Any]:
    """The model's entry of the JSON."""
    steps = subject.call["num_inference_steps"]
    found = {name: dict(row) for name, row in found.items()}
    wall, process = ({name: [clocks[name][i] / steps for clocks in subject.rounds] for name in found} for i in (0, 1))
    chosen = process if clock == "process" else wall
    for name, row in found.items():
        row["time_to_plain"] = Ratio.of(chosen[name], chosen["plain"]).to_dict()
        row["time_to_naive"] = Ratio.of(chosen[name], chosen["naive"]).to_dict()
        row["wall_to_plain"] = Ratio.of(wall[name], wall["plain"]).to_dict()
        row["wall_to_naive"] = Ratio.of(wall[name], wall["naive"]).to_dict()
        row["seconds_per_step"] = {
            "wall": [round(value, 4) for value in wall[name]],
            "process": [round(value, 4) for value in process[name]],
        }
        if name.startswith("ours"):
            row["limit_to_naive"] = analytic_limit(subject.blocks, subject.case.branches, subject.layers[name])
    size = subject.case.sizes[subject.size]
    entry = {
        "name": subject.case.name,
        "title": subject.case.title,
        "pipeline": type(subject.pipe).__name__,
        "cfg": subject.case.cfg,
        "branches": subject.case.branches,
        "blocks": subject.blocks,
        "layer": subject.layers["ours"],
        "deep_layer": subject.layers["ours_deep"],
        "width": size.width,
        "heads": size.heads,
        "head_dim": size.head_dim,
        "video_tokens": size.tokens,
        "text_tokens": size.text,
        "parameters": sum(p.numel() for p in subject.pipe.transformer.parameters()),
        "variants": found,
    }
    if not torch.cuda.is_available():
        entry |= split(subject, found, process)
    entry["bars"] = bars(entry)
    return entry


def split(subject: Subject, found: dict[str, dict[str, Any]], process: dict[str, list[float]]) -> dict[str, Any]:
    """Time inside the blocks and outside them: what a busy machine blurs, and what the ways to guide differ in.

    The same block takes the same time in every variant, so the difference between two variants is the blocks that
    only one of them runs, plus the difference of their times outside the blocks. That has no noise of the blocks
    in it, and resolves overheads that the plain ratio of two long runs cannot.
    """
    steps = subject.call["num_inference_steps"]
    outside = {
        name: median(
            process[name][number] - sum(seconds for _, seconds in calls[name]) / steps
            for number, calls in enumerate(subject.in_blocks)
        )
        for name in found
    }
    per_block = third_pass(subject)
    naive, plain = median(process["naive"]), median(process["plain"])
    for name, row in found.items():
        row["seconds_outside_blocks"] = round(outside[name], 5)
        if name.startswith("ours"):
            limit = 1 - sum(per_block[: subject.layers[name] + 1]) / naive
            row["measured_limit_to_naive"] = round(limit, 5)
            row["split_time_to_naive"] = round(limit + (outside[name] - outside["naive"]) / naive, 5)
    found["scale_0"]["split_overhead"] = round((outside["scale_0"] - outside["plain"]) / plain, 5)
    return {
        "seconds_per_block": round(sum(per_block) / len(per_block), 5),
        "share_outside_blocks": round(outside["plain"] / plain, 5),
    }


def third_pass(subject: Subject) -> list[float]:
    """Seconds of each block in the naive third pass, which is every block's second call in a step."""
    steps = subject.call["num_inference_steps"]
    seconds: list[list[float]] = [[] for _ in range(subject.blocks)]
    for calls in subject.in_blocks:
        own: list[list[float]] = [[] for _ in range(subject.blocks)]
        for place, value in calls["naive"]:
            own[place].append(value)
        for place, values in enumerate(own):
            seconds[place] += values[1 :: len(values) // steps]
    return [median(values) for values in seconds]
