"""`skipguide bench` on a language model: perplexity and agreement per method and size, on the user's text."""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from skipguide.cli import llm_models
from skipguide.cli.bench_report import finish, write_results
from skipguide.cli.outputs import versions
from skipguide.cli.processes import Process
from skipguide.cli.result_cells import Result, ResultCells, open_plan
from skipguide.errors import SkipError

PIECES, QUICK_PIECES, TOKENS, QUICK_TOKENS = 24, 8, 256, 128
CALIBRATED_AT_MOST, SEARCHED_AT_MOST = 12, 4  # pieces: more hardly change a ranking


@dataclass(frozen=True)
class Subject:
    """What is measured: a model, and the pieces of a text that sets are chosen and judged on."""

    lm: llm_models.LanguageModel
    chosen_on: list[Any]
    judged_on: list[Any]

    @cached_property
    def whole(self) -> Any:
        """Losses and most probable tokens of the whole model."""
        from skipguide.bench.language import judge

        return judge(self.lm.model, self.judged_on)


def run(args: argparse.Namespace, folder: Path, process: Process) -> None:
    """Measure what is missing, write the report."""
    from skipguide.bench.language import METHODS, QUICK_SHARES, SHARES, Facts, counts_of, measure
    from skipguide.llm import AdaSkip, MeasuredSkip, SkipOrder, SublayerStats

    texts = llm_models.texts(args.text)
    tokens = args.tokens or (QUICK_TOKENS if args.quick else TOKENS)
    pieces = args.pieces or (QUICK_PIECES if args.quick else PIECES)
    plan = {
        "bench": "language model",
        "model": args.model,
        "text": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
        "tokens": tokens,
        "pieces": pieces,
        "counts": args.counts,
        "quick": args.quick,
        "dtype": args.dtype,
        "versions": versions(),
    }
    open_plan(folder, plan, force=args.force)
    subject = load(args, texts, tokens, pieces)
    lm, layers = subject.lm, subject.lm.describe()["layers"]
    cells = ResultCells(folder / "cells", process)
    depends = {**plan, "device": lm.device.partition(":")[0], "parameters": lm.describe()["parameters"]}
    chosen_on = subject.chosen_on[:CALIBRATED_AT_MOST]
    stats = SublayerStats.from_dict(
        cells.once("statistics", depends, lambda: AdaSkip.calibrate(lm.model, chosen_on).to_dict())
    )
    counts = tuple(args.counts or counts_of(layers, QUICK_SHARES if args.quick else SHARES))
    if wrong := [count for count in counts if count >= 2 * layers]:
        raise SkipError(f"--counts {wrong[0]} leaves nothing of the {2 * layers} sublayers of {lm.name}")
    order = None
    if not args.quick:
        searched_on, most = subject.chosen_on[:SEARCHED_AT_MOST], max(counts)

        def search() -> Result:
            try:
                return MeasuredSkip.calibrate(lm.model, searched_on, most).to_dict()
            except SkipError as error:  # of more than this model can run without
                return {"refused": str(error)}

        found = cells.once("search", {**depends, "most": most}, search)
        order = None if "refused" in found else SkipOrder.from_dict(found)
    facts = Facts(stats, order)
    methods = [method for method in METHODS if not (args.quick and method.searched)]
    jobs = [(method, count) for method in methods for count in counts]
    results = cells.all(
        jobs,
        name=lambda job: f"{job[0].name} {job[1]}",
        depends=lambda job: {**depends, "method": job[0].name, "count": job[1]},
        make=lambda job: measure(lm.model, subject.judged_on, subject.whole, job[0], facts, job[1]),
        what="sets",
    )
    whole = cells.once("whole", depends, lambda: {"losses": subject.whole[0]})["losses"]
    if process.shows:
        named = [(method.name, count) for method, count in jobs]
        write(folder, subject, dict(zip(named, results, strict=True)), counts, whole, {m.name: m.note for m in methods})


def load(args: argparse.Namespace, texts: Sequence[str], tokens: int, pieces: int) -> Subject:
    """The model, and the two halves of its text.

    Raises:
        SkipError: for a text of less than four pieces.
    """
    lm = llm_models.load(args.model, args.device, args.dtype)
    windows = lm.windows(texts, tokens, 2 * pieces)
    if len(windows) < 4:
        raise SkipError(
            f"the text holds {len(windows)} pieces of {tokens} tokens; expected at least 4, two to choose on and two "
            f"to judge on: give a longer --text, or fewer --tokens"
        )
    return Subject(lm, windows[: len(windows) // 2], windows[len(windows) // 2 :])


def write(
    folder: Path,
    subject: Subject,
    results: dict[tuple[str, int], Result],
    counts: Sequence[int],
    whole: list[float],
    notes: dict[str, str],
) -> None:
    """The report, the JSON and the CSV."""
    from skipguide.bench.charts import lines
    from skipguide.bench.language import rise
    from skipguide.bench.report import Cell, Report, shown

    lm, plain = subject.lm, math.exp(statistics.fmean(whole))
    total = 2 * lm.describe()["layers"]
    body = [[Cell("whole model"), *(Cell(shown(plain)) for _ in counts)]]
    table: list[dict[str, Any]] = []
    series: dict[str, list[tuple[float, float]]] = {}
    missing: dict[str, str] = {}
    for name in notes:
        cells = [Cell(name)]
        for count in counts:
            found = results[name, count]
            if "refused" in found:
                missing[f"{name}, {count}"] = str(found["refused"])
                cells.append(Cell("–"))
                continue
            losses = [float(loss) for loss in found["losses"]]
            perplexity, change = math.exp(statistics.fmean(losses)), rise(losses, whole)
            low, high = (math.exp(change.mean + sign * (change.half or 0.0)) for sign in (-1, 1))
            times = f"×{shown(math.exp(change.mean))} ({shown(low)} to {shown(high)}), {found['agreement']:.0%} agree"
            cells.append(Cell(shown(perplexity), times, change.verdict("lower")))
            series.setdefault(name, []).append((count, perplexity))
            table.append(
                {
                    "method": name,
                    "sublayers": count,
                    "of": total,
                    "perplexity": perplexity,
                    "loss_rise": change.mean,
                    "half_interval": change.half,
                    "pieces": change.count,
                    "agreement": found["agreement"],
                }
            )
        body.append(cells)
    lead = conclusion(table, counts, plain)
    report = Report(f"What leaving sublayers out costs {lm.name}", lead)
    report.heading(f"Perplexity with so many of {total} sublayers left out")
    report.table(["method", *(f"{count} ({count / total:.0%})" for count in counts)], body, 0)
    report.note(
        "Chosen on one half of the text, judged on the other. Small: times the whole model's perplexity with the 95 % "
        "interval over pieces (pairs, Student's t), and how often the most probable token is the whole model's."
    )
    if series:
        report.chart(lines("Perplexity", series, ("sublayers left out", "perplexity"), logarithmic=True))
    report.heading("What the methods are")
    report.terms(notes)
    if missing:
        report.note("Not there:")
        report.terms(missing)
    size = f"{len(subject.judged_on)} pieces of {subject.judged_on[0].shape[1]} tokens"
    finish(report, {"model": f"{lm.name} ({lm.describe()['class']}, {lm.dtype})", "text": size})
    write_results(
        folder, report, {"model": lm.describe(), "conclusion": lead, "rows": table, "missing": missing}, table
    )


def conclusion(table: Sequence[dict[str, Any]], counts: Sequence[int], plain: float) -> str:
    """What was found, in words."""
    from skipguide.bench.report import shown

    words = [f"Perplexity of the whole model: {shown(plain)}."]
    for count in (counts[0], counts[-1]) if len(counts) > 1 else counts:
        rows = [row for row in table if row["sublayers"] == count]
        if not rows:
            continue
        best = min(rows, key=lambda row: row["perplexity"])
        words.append(
            f"With {count} of {best['of']} sublayers left out the best is {best['method']}: "
            f"{shown(best['perplexity'])} ({best['agreement']:.0%} of the tokens agree)."
        )
        control = next((row for row in rows if row["method"].startswith("random")), None)
        if control is not None and control is not best:
            words.append(f"Random sublayers: {shown(control['perplexity'])}.")
    return " ".join(words)
