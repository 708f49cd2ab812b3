"""What `skipguide bench` writes: the report, the table as JSON and CSV, the contact sheet."""

from __future__ import annotations

import csv
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipguide.bench.charts import forest
from skipguide.bench.report import Cell, Report, compared
from skipguide.bench.summary import Row, conclusion
from skipguide.cli.bench_clips import Table
from skipguide.cli.bench_requests import BenchClips
from skipguide.cli.clip_job import in_words
from skipguide.cli.file_locks import FolderLocks, remove_leftovers
from skipguide.cli.outputs import replacing, versions, write_json
from skipguide.media import pictures

if TYPE_CHECKING:
    from PIL.Image import Image

HTML, JSON, CSV, SHEET = "report.html", "results.json", "results.csv", "sheet.png"
SHOWN_PROMPTS, SHOWN_FRAMES, HEIGHT = 2, 3, 96  # of the contact sheet
READ = (
    "Each row starts from the same noise for the same prompts. The number is the mean; the small one below it is the "
    "difference to the baseline (the blue row) with its 95 % interval, from pairs over seeds (diversity: over "
    "prompts), Student's t. It is green or red where the interval does not contain 0 and the score has a better "
    "direction. Many rows and scores were looked at: one in twenty intervals lies beside the truth."
)
UNDECIDED = (
    "Whether skipping helps is left open: without --scorer all scores are of pixels or the model's own. They can "
    "choose among CFG scales and show what skipping changes; but a model does not like what leads away from its own "
    "predictions, and neither scores what a person sees."
)


def write_results(folder: Path, report: Report, results: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
    """The report, the JSON and the CSV, all or none."""
    names = [folder / name for name in (HTML, JSON, CSV)]
    with FolderLocks(folder).hold("report", wait=True):
        for path in names:
            remove_leftovers(folder, path.stem)
        with replacing(*names) as (html, data, table):
            html.write_text(report.html(), encoding="utf-8")
            write_json(data, {**results, "machine": machine(), "versions": versions()})
            write_table(table, lines)


def write_table(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """A CSV whose columns are the keys of its lines."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for line in lines for key in line)))
        writer.writeheader()
        writer.writerows(lines)


def machine() -> str:
    """What the times were measured on."""
    import torch

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{where}, {threads} CPU {'thread' if threads == 1 else 'threads'}"


def finish(report: Report, about: Mapping[str, str]) -> None:
    """The end of every report: with what it was made, and how to make it again."""
    report.heading("With what")
    found = {**about, "machine": machine(), "versions": ", ".join(f"{k} {v}" for k, v in versions().items())}
    report.terms(found)
    report.note("The same again (a run that was stopped goes on):")
    report.code(shlex.join(["skipguide", *sys.argv[1:]]) if sys.argv[1:2] == ["bench"] else "skipguide bench ...")


def clips_report(table: Table, clips: BenchClips, name: str, folder: Path) -> None:
    """Everything about a pipeline."""
    picture = contact_sheet(table, clips)
    with FolderLocks(folder).hold("sheet", wait=True), replacing(folder / SHEET) as (file,):
        picture.save(file)
    lead = verdict(table)
    report = Report(f"Does skipping layers help {name}?", lead)
    report.heading("The table")
    names = [score for score in table.scores if any(score in row.means for row in table.rows)]
    head = ["setting", "CFG scale", "steps", "blocks", *names, "seconds"]
    body = [_line(row, names, table) for row in table.rows]
    marked = next(number for number, row in enumerate(table.rows) if row.setting.name == table.baseline.name)
    report.table(head, body, marked)
    report.note(READ)
    report.note("Blocks: what is run of the denoiser, relative to plain CFG. Seconds: of a clip on this machine.")
    report.heading("Differences to the baseline")
    for score in names:
        better = table.scores[score].better
        found = [
            (row.setting.name, row.against[score], row.against[score].verdict(better))
            for row in table.rows
            if score in row.against
        ]
        if found and better is not None:
            report.chart(forest(score, found, f"difference to {table.baseline.name}, 95 % interval"))
    report.heading("What it looks like")
    report.picture(picture, "frames of the first prompts, a row for each setting")
    report.heading("What the rows are")
    report.terms(_notes(table))
    if table.missing:
        report.note("Rows that could not be had:")
        report.terms({each.name: each.reason for each in table.missing})
    report.heading("What the scores are")
    report.terms({score: table.scores[score].what for score in names})
    prompts = "; ".join(line.prompt for line in clips.lines)
    about = {"model": f"{name} ({clips.model.pipeline_class.__name__}, {clips.model.dtype})", "prompts": prompts}
    finish(report, {**about, "clips": f"{len(clips.lines)} prompts × {clips.seeds} seeds, {table.steps} steps"})
    results = {
        "model": name,
        "conclusion": lead,
        "judge": table.judge,
        "judge_decides": table.decides,
        "baseline": table.baseline.name,
        "candidate": table.candidate.name if table.candidate is not None else None,
        "steps": table.steps,
        "prompts": [line.prompt for line in clips.lines],
        "seeds": clips.seeds,
        "rows": [row.to_dict(table.scores) for row in table.rows],
        "missing": {each.name: each.reason for each in table.missing},
    }
    write_results(folder, report, results, list(_csv_lines(table, names)))


def _notes(table: Table) -> dict[str, str]:
    """What each row is, the grid as one, with the settings of the guidance."""
    found = {}
    for row in table.rows:
        setting = row.setting
        words = f": {in_words(setting.guidance)}" if setting.guidance and setting.guidance.get("layers") else ""
        found["cfg-..." if setting.kind == "cfg" and setting.w is not None else setting.name] = setting.note + words
    return found


def verdict(table: Table) -> str:
    """What was found, in words."""
    words = []
    if table.judge is None:
        words.append("No score could choose among the CFG scales: the model's own one is the baseline.")
    elif table.baseline.w is not None:
        words.append(f"Best plain CFG, by {table.judge}: scale {table.baseline.w:g}.")
    if table.edge:
        words.append("It is at the edge of the grid: a better one may lie outside (--grid).")
    if table.candidate is None:
        words.append("No skip guidance could be had on this model: see the rows that are missing.")
    elif not table.decides or table.judge is None:
        words.append(UNDECIDED)
    elif (better := table.scores[table.judge].better) is not None:
        words.append(conclusion(table.rows, table.candidate.name, table.baseline.name, table.judge, better))
    return " ".join(words)


def _line(row: Row, names: Sequence[str], table: Table) -> list[Cell]:
    setting = row.setting
    scale = "" if setting.w is None else f"{setting.w:g}"
    cells = [Cell(setting.name), Cell(scale), Cell(str(setting.steps or table.steps)), Cell(f"{setting.cost:.2f}")]
    for name in names:
        if name not in row.means:
            cells.append(Cell("–"))
        else:
            cells.append(compared(row.means[name], row.against.get(name), table.scores[name].better))
    return [*cells, Cell(f"{row.seconds:.1f}")]


def _csv_lines(table: Table, names: Sequence[str]) -> Iterable[dict[str, Any]]:
    for row in table.rows:
        for name in names:
            if name in row.means:
                against, setting = row.against.get(name), row.setting
                yield {
                    "setting": setting.name,
                    "kind": setting.kind,
                    "cfg_scale": setting.w,
                    "steps": setting.steps or table.steps,
                    "blocks": setting.cost,
                    "score": name,
                    "mean": row.means[name],
                    "difference": against.mean if against is not None else None,
                    "half_interval": against.half if against is not None else None,
                    "pairs": against.count if against is not None else None,
                    "verdict": against.verdict(table.scores[name].better) if against is not None else "",
                }


def contact_sheet(table: Table, clips: BenchClips) -> Image:
    """A few frames of the first clips of every setting."""
    prompts = list(range(min(SHOWN_PROMPTS, len(clips.lines))))
    rows = []
    for row in table.rows:
        first = {request.number: request for request in clips.requests(row.setting) if request.seed == 0}
        strips = []
        for number in prompts:
            frames = pictures.resized(pictures.pick(first[number].frames(), SHOWN_FRAMES), HEIGHT)
            strips.append(pictures.in_a_row(frames, gap=2))
        rows.append(strips)
    return pictures.contact_sheet(
        rows,
        title="The same noise in every row; seed 0",
        row_labels=[row.setting.name for row in table.rows],
        column_labels=[clips.lines[number].prompt for number in prompts],
    )
