"""`skipguide llm rank`: a table and a picture of what every sublayer does, and what its kind costs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from skipguide.cli.llm_models import load, statistics_of
from skipguide.cli.outputs import check_output, plain_arguments, replacing, slug, versions
from skipguide.errors import SkipError

PARTS = ("attn", "mlp")


def run(args: argparse.Namespace) -> None:
    """Measure, print the table, draw the picture."""
    output = None if args.no_picture else args.output or Path(f"{slug(Path(args.model).name)}-rank.png")
    if output is not None:
        _require_matplotlib()
        check_output(output, (".png",), force=args.force, notes=False)
    lm = load(args.model, args.device, args.dtype)
    from skipguide.llm.cost import measure_costs

    stats = statistics_of(lm, args.text, args.stats, args.pieces, args.tokens)
    costs = measure_costs(lm.model, args.context, args.phase)
    rows = table(stats, costs)
    if output is not None:
        with replacing(output) as (file,):
            draw(rows, f"{lm.name}: {len(rows)} sublayers, time at {args.context} tokens ({args.phase})", file)
    if args.json:
        report = {
            "model": lm.describe(),
            "sublayers": rows,
            "statistics": stats.to_dict(),
            "costs": costs.to_dict(),
            "picture": str(output) if output else None,
            "arguments": plain_arguments(args),
            "versions": versions(),
        }
        print(json.dumps(report, indent=2, default=str))
        return
    model = lm.describe()
    print(f"{lm.name}: {model['class']}, {model['layers']} layers, {lm.device} {lm.dtype}; {stats.requests} pieces")
    print(as_text(rows))
    print(
        f"similarity: of the stream before and after (1: it does nothing); ms: {args.phase}, {args.context} tokens, of "
        "layers of one shape the median"
    )
    if output is not None:
        print(output)


def table(stats: Any, costs: Any) -> list[dict[str, Any]]:
    """One row per sublayer, the most similar first."""
    layers = stats.num_layers
    rows = []
    for place, number in enumerate(stats.ranking()):
        part, layer = PARTS[number >= layers], number % layers
        similarity, ms = getattr(stats, f"{part}_similarity")[layer], getattr(costs, f"{part}_ms")[layer]
        rows.append(
            {
                "rank": place + 1,
                "layer": layer,
                "part": part,
                "similarity": similarity,
                "scale": getattr(stats, f"{part}_scale")[layer],
                "ms": ms,
                "damage_per_ms": (1 - similarity) / ms,
            }
        )
    cheap = {(row["layer"], row["part"]): i + 1 for i, row in enumerate(sorted(rows, key=lambda r: r["damage_per_ms"]))}
    return [row | {"cost_aware_rank": cheap[row["layer"], row["part"]]} for row in rows]


def as_text(rows: list[dict[str, Any]]) -> str:
    """The table."""
    head = f"{'rank':>4}  {'sublayer':<10}  {'similarity':>10}  {'scale':>6}  {'ms':>7}  {'damage/ms':>9}  rank per ms"
    lines = [
        f"{row['rank']:>4}  {row['layer']:>3} {row['part']:<6}  {row['similarity']:>10.4f}  {row['scale']:>6.3f}  "
        f"{row['ms']:>7.4f}  {row['damage_per_ms']:>9.4f}  {row['cost_aware_rank']:>11}"
        for row in rows
    ]
    return "\n".join([head, *lines])


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Similarity, scale and milliseconds by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, (name, label) in zip(
        figure.subplots(1, 3),
        (
            ("similarity", "similarity (1: does nothing)"),
            ("scale", "growth of the norm"),
            ("ms", "milliseconds (of layers of one shape the median)"),
        ),
        strict=True,
    ):
        for part, colour in (("attn", "tab:blue"), ("mlp", "tab:orange")):
            found = sorted((row["layer"], row[name]) for row in rows if row["part"] == part)
            axes.plot(*zip(*found, strict=True), "o-", markersize=4, label=part, color=colour)
        _zoom(axes, [row for row in rows if row["layer"] > 0], [row for row in rows if row["layer"] == 0], name)
        axes.set_xlabel("layer")
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)


def _zoom(axes: Any, others: list[dict[str, Any]], first: list[dict[str, Any]], name: str) -> None:
    """Show the differences among the layers: a first layer far from all others is written at the edge instead."""
    if not others:
        return
    low, high = min(row[name] for row in others), max(row[name] for row in others)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    far = [row for row in first if row[name] < low - 4 * room or row[name] > high + 4 * room]
    if name == "ms":  # a time is compared with nothing at all
        axes.set_ylim(bottom=0)
    elif far:
        axes.set_ylim(low - room, high + room)
        words = "layer 0: " + ", ".join(f"{row['part']} {row[name]:.3g}" for row in far)
        axes.text(0.03, 0.5, words, transform=axes.transAxes, rotation=90, va="center", fontsize=8)


def _require_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise SkipError("the picture needs matplotlib: pip install 'skipguide[plot]', or give --no-picture")
