"""`skipguide bench` on a classifier: how often it keeps its class with parts of the user's pictures hidden."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skipguide.cli.bench_report import finish, write_results
from skipguide.cli.models import choose_dtype
from skipguide.cli.outputs import versions
from skipguide.cli.processes import Process
from skipguide.cli.result_cells import Result, ResultCells, open_plan
from skipguide.errors import SkipError

QUICK_PICTURES, QUICK_SEEDS, SEEDS = 12, 1, 3


def run(args: argparse.Namespace, folder: Path, process: Process) -> None:
    """Measure what is missing, write the report."""
    from skipguide.bench.masking import QUICK_SHARES, SHARES, kept
    from skipguide.media.frames import open_picture
    from skipguide.vision.layer_masking.classifiers import load_classifier

    if args.dtype not in ("auto", "float32"):
        raise SkipError(f"--dtype {args.dtype} does nothing for a classifier, which runs in float32: leave it out")
    paths = pictures_of(args.images)
    paths = paths[:QUICK_PICTURES] if args.quick else paths
    digests = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    seeds, shares = (QUICK_SEEDS, QUICK_SHARES) if args.quick else (args.seeds, SHARES)
    plan = {
        "bench": "classifier",
        "model": args.model,
        "checkpoint": args.checkpoint,
        "pictures": {str(path.relative_to(args.images)): digests[path] for path in paths},
        "shares": shares,
        "masks": seeds,
        "versions": versions(),
    }
    open_plan(folder, plan, force=args.force)
    classifier = load_classifier(args.model, checkpoint=args.checkpoint)
    classifier.model.to(process.device)
    cells = ResultCells(folder / "cells", process)
    depends = {
        **plan,
        "device": process.device.partition(":")[0],
        "dtype": choose_dtype("float32", "cpu", bundled=True),
    }

    def measure(path: Path) -> Result:
        image = classifier.prepare(open_picture(path)).to(process.device)
        return kept(classifier.model, image, classifier.scale, shares, seeds)

    results = cells.all(
        paths,
        name=lambda path: f"{path.relative_to(args.images)} {digests[path][:8]}",
        depends=lambda path: {**depends, "picture": digests[path]},
        make=measure,
        what="pictures",
    )
    if process.shows:
        write(folder, args.model, results, shares, seeds)


def pictures_of(folder: Path | None) -> list[Path]:
    """The pictures in a folder, and in the folders in it.

    Raises:
        SkipError: for a folder without one.
    """
    from PIL import Image

    if folder is None:
        raise SkipError("a classifier is measured on pictures: give a folder of them with --images")
    if not folder.is_dir():
        raise SkipError(f"expected --images as a folder of pictures; got {folder}")
    known = Image.registered_extensions()
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in known)
    if len(found) < 2:
        raise SkipError(f"{folder} has {len(found)} pictures; expected at least 2, for an interval")
    return found


def write(folder: Path, name: str, results: Sequence[Result], shares: Sequence[float], seeds: int) -> None:
    """The report, the JSON and the CSV."""
    from skipguide.bench.charts import lines
    from skipguide.bench.intervals import paired
    from skipguide.bench.masking import FILLS, NAMES, OURS, PROTOCOLS
    from skipguide.bench.report import Cell, Report, difference

    table: list[dict[str, Any]] = []
    sections: list[tuple[str, list[list[Cell]], dict[str, list[tuple[float, float]]]]] = []
    words: list[str] = []
    for protocol in PROTOCOLS:
        body, series = [], {}
        for fill in FILLS:
            cells, curve = [Cell(NAMES[fill])], []
            for place, share in enumerate(shares):
                own = {number: float(result[protocol][fill][place]) for number, result in enumerate(results)}
                ours = {number: float(result[protocol][OURS][place]) for number, result in enumerate(results)}
                mean, against = 100 * sum(own.values()) / len(own), paired(own, ours)
                assert against is not None
                points = type(against)(100 * against.mean, against.half and 100 * against.half, against.count)
                other = fill != OURS
                small = difference(points) if other else ""
                cells.append(Cell(f"{mean:.0f} %", small, points.verdict("higher") if other else ""))
                curve.append((100 * share, mean))
                table.append(
                    {
                        "protocol": protocol,
                        "fill": NAMES[fill],
                        "hidden": share,
                        "kept_percent": mean,
                        "difference_to_layer_masking": points.mean if other else None,
                        "half_interval": points.half if other else None,
                        "pictures": points.count,
                    }
                )
            body.append(cells)
            series[NAMES[fill]] = curve
        sections.append((protocol, body, series))
        words.append(_conclusion(protocol, series))
    report = Report(f"Does layer masking help {name}?", " ".join(words))
    for protocol, body, series in sections:
        report.heading(f"Classes kept as {protocol} are hidden")
        report.table(["hidden", *(f"{share:.0%}" for share in shares)], body, 0)
        report.chart(lines(f"Classes kept, {protocol}", series, ("per cent hidden", "per cent kept")))
    report.note(
        "Per cent of the pictures whose class is the one that the whole picture has. Small: difference to layer "
        "masking, in points, with its 95 % interval over the pictures (pairs, Student's t); red: that fill "
        "keeps fewer. Keeping the class is what a harmless removal does; where what is hidden is the object itself, "
        "keeping it is no merit."
    )
    finish(report, {"model": name, "pictures": f"{len(results)}, {seeds} masks of each share and kind"})
    write_results(folder, report, {"model": name, "conclusion": " ".join(words), "rows": table}, table)


def _conclusion(protocol: str, series: dict[str, list[tuple[float, float]]]) -> str:
    means = {name: sum(y for _, y in curve) / len(curve) for name, curve in series.items()}
    ours = means.pop("layer masking")
    best = max(means, key=lambda name: means[name])
    word = "more than" if ours > means[best] else "less than" if ours < means[best] else "as much as"
    return (
        f"{protocol.capitalize()}: layer masking keeps {ours:.0f} % of the classes on average, {word} the best paint "
        f"({best.removeprefix('painted: ')}, {means[best]:.0f} %)."
    )
