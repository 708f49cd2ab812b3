"""The tables and the figure of llm.json."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from demos.benchmarks.llm_quality_report import DRAWN, band, mean
from demos.benchmarks.measure import write_text
from demos.study import canvas, save_figure, table

Rows = list[dict[str, Any]]
SEARCH = ("measured search", "#000000")
COLOURS = {method: colour for method, (colour, _) in DRAWN.items()} | dict([SEARCH])
LABELS = {"measured damage": "measured, each alone", "measured search": "MeasuredSkip (search)"}
TIMED = ("reading a window", "decoding a token")
KINDS = {"english": "English", "code": "Python source", "chat": "chat"}


def rows_of(data: dict[str, Any], part: str, **about: Any) -> Rows:
    """The measurements of one part that agree with what is given."""
    return [
        row for row in data["rows"] if row["part"] == part and all(row[key] == value for key, value in about.items())
    ]


def lines_of(rows: Rows) -> dict[tuple[str, bool], dict[int, Rows]]:
    """Method and whether it has scales -> count -> rows, several where there are seeds."""
    found: dict[tuple[str, bool], dict[int, Rows]] = {}
    for row in rows:
        found.setdefault((row["method"], row["compensate"]), {}).setdefault(row["count"], []).append(row)
    return found


def label(method: str, compensate: bool) -> str:
    """A method as the tables call it."""
    return LABELS.get(method, method) + (" + scales" if compensate else "")


def number(value: float) -> str:
    """A perplexity."""
    return f"{value:.1f}" if value < 1000 else f"{value:.0e}".replace("e+0", "e")


def cell(rows: Rows) -> str:
    """Perplexity and agreement, with the spread over seeds."""
    text = number(mean(rows, "perplexity"))
    if len(rows) > 1:
        low, high = band(rows, "perplexity")
        text += f" ({number(low)}–{number(high)})"
    return f"{text} / {mean(rows, 'agreement'):.0%}"


def quality_table(data: dict[str, Any], kind: str) -> str:
    """Methods by counts on one kind of text."""
    rows = rows_of(data, "prefill", text=kind)
    whole = next(row for row in rows if row["method"] == "whole model")
    counts = data["settings"]["counts"]
    found = lines_of([row for row in rows if row["method"] != "whole model"])
    order = sorted(found, key=lambda key: last_of(found[key], counts))
    lines = [[label(*key), *(cell(found[key][n]) if n in found[key] else "" for n in counts)] for key in order]
    total = 2 * data["model"]["layers"]
    head = ["perplexity / same most probable token", *(f"{n} of {total}" for n in counts)]
    return (
        f"{KINDS[kind]}, {data['tokens'][kind]:,} tokens; the whole model: {whole['perplexity']:.1f}\n\n"
        + table(head, lines)
    )  # fmt: skip


def last_of(found: dict[int, Rows], counts: Iterable[int]) -> float:
    """What lines are sorted by: the loss summed over the counts; one that is not there counts as a bad one."""
    return sum(math.log(mean(found[n], "perplexity")) if n in found else 20.0 for n in counts)


def samples_table(data: dict[str, Any]) -> str:
    """AdaSkip with other calibration samples."""
    counts = data["settings"]["counts"]
    first = lines_of(rows_of(data, "prefill", text="english", method="AdaSkip", compensate=True))
    others = lines_of(rows_of(data, "sample"))
    key = ("AdaSkip", True)
    lines = []
    for n in counts:
        all_rows = [*first.get(key, {}).get(n, []), *others.get(key, {}).get(n, [])]
        values = [row["perplexity"] for row in all_rows]
        if values:
            lines.append([n, number(min(values)), number(statistics.median(values)), number(max(values)), len(values)])
    return table(["sublayers", "least", "median", "most", "samples"], lines)


def decode_table(data: dict[str, Any]) -> str:
    """Decoding after a prompt that the whole model has read."""
    rows = rows_of(data, "decode")
    if not rows:
        return ""
    counts = data["settings"]["counts"]
    methods = [m for m in dict.fromkeys(row["method"] for row in rows) if m != "whole model"]
    by = {(row["method"], row["count"]): row for row in rows}
    lines = [[label(m, False), *(cell([by[m, n]]) if (m, n) in by else "" for n in counts)] for m in methods]
    return table([f"decoding; the whole model: {rows[0]['perplexity']:.1f}", *(str(n) for n in counts)], lines)


def time_table(data: dict[str, Any]) -> str:
    """Time over the whole model's, beside the shares that stay."""
    rows = rows_of(data, "time")
    lines = []
    for plan in dict.fromkeys((row["method"], row["count"]) for row in rows):
        own = {row["what"]: row for row in rows if (row["method"], row["count"]) == plan}
        about = next(iter(own.values()))
        lines.append([
            f"{plan[1]}, {plan[0]}", f"{about['attentions']} attentions", f"{1 - about['share']:.3f}",
            f"{1 - about['weights_share']:.3f}",
            *(quartiles(own[what]["ratio"]) if what in own else "" for what in TIMED),
        ])  # fmt: skip
    head = ["left out", "of them", "sublayers that stay", "weights that stay", *TIMED]
    return table(head, lines)


def quartiles(ratio: dict[str, Any]) -> str:
    """`0.955 (0.954–0.961)`."""
    return f"{ratio['median']:.3f} ({ratio['quartiles'][0]:.3f}–{ratio['quartiles'][1]:.3f})"


def speculation_table(data: dict[str, Any]) -> str:
    """Drafts by the thinned model."""
    lines = [
        [
            f"{row['share']:.0%}", len(row["attn"]), len(row["mlp"]), f"{row['acceptance']:.0%}",
            f"{row['draft_cost']:.2f}", f"{row['verify_cost']:.2f}", f"{row['analytic']['speedup']:.2f}",
        ]
        for row in rows_of(data, "speculation")
    ]  # fmt: skip
    head = ["time left out", "attentions", "MLPs", "accepted", "a draft token", "verifying", "best possible"]
    return table(head, lines)


def automatic_table(data: dict[str, Any]) -> str:
    """`SelfSpeculative` that chooses everything itself."""
    lines = [
        [
            "from the model and the text" if row["lookup"] else "from the model alone", row["tokens"],
            quartiles(row["time"]), "yes" if row["same_text"] else "no",
        ]
        for row in rows_of(data, "automatic")
    ]  # fmt: skip
    return table(["drafts", "tokens", "time over plain decoding's", "the same text"], lines)


def tuning_lines(data: dict[str, Any]) -> str:
    """Unified Layer Skipping before and after."""
    (row,) = rows_of(data, "fine-tuning")
    lines = [[name, f"{row[name]['whole']:.1f}", number(row[name]["skipped"])] for name in ("before", "after")]
    return (
        f"{row['count'] // 2} layers left out while decoding ({row['method']}); {row['steps']} steps, "
        f"{row['tokens']:,} tokens of {row['windows']} windows, {row['cpu_seconds'] / 60:.1f} minutes of one core. "
        "Perplexity of the second halves of the English windows, whose first halves the whole model reads:\n\n"
        + table(["", "all layers", "without them"], lines)
    )


def example_lines(data: dict[str, Any]) -> Iterable[str]:
    """Greedy texts."""
    for prompt in dict.fromkeys(row["prompt"] for row in rows_of(data, "example")):
        yield f"\n**{prompt.replace('<chat>', '(chat) ')}**\n"
        for row in rows_of(data, "example", prompt=prompt):
            name = label(row["method"], False) + (f", {row['share']:.0%}" if row["share"] else "")
            yield f"- *{name}:* {' '.join(row['text'].split())}"


def tables(data: dict[str, Any]) -> str:
    """Everything as Markdown."""
    model, calibration, search = data["model"], data["calibration"], data["search"]
    lines = [
        f"# {model['name']}, {2 * model['layers']} sublayers\n",
        f"Made by `python -m demos.real.llm --form {data['form']}`. Sets are chosen on the valid part of WikiText-2 "
        f"({calibration['tokens']:,} tokens for similarities, {search['tokens']:,} for measured damage), also for code "
        "and chat. Lines are sorted by the loss over all counts.\n",
        f"Calibrating AdaSkip took {statistics.median(calibration['cpu_seconds']):.0f} s of one core, the search of "
        f"MeasuredSkip {search['cpu_seconds']:.0f} s ({search['trials']} trials for {len(search['order'])} "
        "sublayers).\n",
        "## Reading a text\n",
        *(quality_table(data, kind) for kind in KINDS if rows_of(data, "prefill", text=kind)),
    ]
    for title, part, text in (
        ("Another calibration sample (AdaSkip with scales, English, perplexity)", "sample", samples_table),
        ("Decoding", "decode", decode_table),
        ("Time", "time", time_table),
        ("Drafts of the thinned model, four tokens at a time", "speculation", speculation_table),
        ("Drafts that are chosen while decoding (`SelfSpeculative()`)", "automatic", automatic_table),
        ("Unified Layer Skipping, fine-tuned for minutes", "fine-tuning", tuning_lines),
    ):
        if rows_of(data, part):
            lines += [f"## {title}\n", text(data)]
    if rows_of(data, "example"):
        lines += ["## What it writes\n", *example_lines(data)]
    return "\n".join(lines) + "\n"


def figure(data: dict[str, Any]) -> Any:
    """Perplexity over the whole model's on three kinds of text, and agreement on English."""
    plots, axes = canvas(2, 2, width=6.2, height=4.0)
    for axis, kind in zip(axes.flat, KINDS, strict=False):
        rows = rows_of(data, "prefill", text=kind)
        if rows:
            _lines(axis, rows, "perplexity")
            axis.set(title=f"{KINDS[kind]} ({data['tokens'][kind]:,} tokens)", yscale="log", ylim=(0.9, 300))
            axis.set_ylabel("perplexity over the whole model's")
            axis.set_yticks([1, 1.5, 2, 5, 10, 30, 100], ["1", "1.5", "2", "5", "10", "30", "100"], minor=False)
            axis.minorticks_off()
    _lines(axes[1, 1], rows_of(data, "prefill", text="english"), "agreement")
    axes[1, 1].set(title="English: same most probable token", ylim=(0, 1))
    for axis in axes.flat:
        axis.set_xlabel(f"sublayers left out, of {2 * data['model']['layers']}")
        axis.grid(alpha=0.25)
    handles, names = axes[0, 0].get_legend_handles_labels()
    plots.legend(handles, names, loc="outside right center", frameon=False, fontsize=8)
    plots.suptitle(f"{data['model']['name']}: leaving sublayers out, chosen on English", fontsize=11)
    return plots


def _lines(axis: Any, rows: Rows, key: str) -> None:
    whole = next(row for row in rows if row["method"] == "whole model")
    base = whole[key] if key == "perplexity" else 1.0
    found = lines_of([row for row in rows if row["method"] != "whole model"])
    counts = sorted({row["count"] for row in rows})
    for name in sorted(found, key=lambda line: last_of(found[line], counts[1:])):
        x = [0, *found[name]]
        y = [1.0, *(mean(own, key) / base for own in found[name].values())]
        ours = name[0].startswith(("AdaSkip", "measured"))
        style = "-" if (ours and name[1]) or name[0] == SEARCH[0] else ":" if ours else "--"
        width = 2.4 if name[0] == SEARCH[0] else 1.4
        axis.plot(x, y, style, color=COLOURS[name[0]], marker="o", ms=3, lw=width, label=label(*name))


def publish(path: Path) -> str:
    """Write the figure and the Markdown next to the JSON; returns the tables."""
    data = json.loads(path.read_text(encoding="utf-8"))
    text = tables(data)
    write_text(path.with_suffix(".md"), text)
    save_figure(figure(data), path.with_suffix(".png"))
    return text
