"""What the studies share: finished cells on disk, means with their spread, tables, figures, where results go."""

from __future__ import annotations

import argparse
import io
import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from demos.benchmarks.measure import keep_existing, machine, write_json, write_text
from skipguide.errors import SkipError
from skipguide.files import replacing

ROOT = Path(__file__).resolve().parents[1]


class Saves(Protocol):
    """A model that can be kept in a folder."""

    def save_pretrained(self, folder: Path, /) -> Any:
        """Write it."""


M = TypeVar("M", bound=Saves)
S = TypeVar("S")


class Cells:
    """Results that are kept as soon as they are there: a study that was stopped goes on where it was.

    Args:
        folder: one JSON file per cell.
        settings: of the study; a folder with other settings is refused.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        note = folder / "settings.json"
        plain = json.loads(json.dumps(settings))
        if note.exists():
            found = json.loads(note.read_text(encoding="utf-8"))
            if found != plain:
                raise SkipError(f"{folder} holds cells of other settings: {found}; expected {plain}: delete the folder")
        write_json(note, plain)

    def __contains__(self, name: str) -> bool:
        """Whether the cell of that name is there."""
        return self._path(name).exists()

    def _path(self, name: str) -> Path:
        return self.folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}.json"

    def __call__(self, name: str, compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The cell of that name; computed if it is not there yet."""
        path = self._path(name)
        if not path.exists():
            write_json(path, compute())
        return dict(json.loads(path.read_text(encoding="utf-8")))


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Mean, sample standard deviation and the values themselves."""
    found = [float(value) for value in values]
    deviation = statistics.stdev(found) if found[1:] else 0.0
    return {"mean": statistics.fmean(found), "sd": deviation, "values": found}


def shown(value: Mapping[str, Any], factor: float = 1.0, digits: int = 1) -> str:
    """`92.1 ± 0.4`; of one value alone, `92.1`."""
    if len(value["values"]) == 1:
        return f"{factor * value['mean']:.{digits}f}"
    return f"{factor * value['mean']:.{digits}f} ± {factor * value['sd']:.{digits}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; all columns but the first are aligned right."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]) + "\n"


def arguments(description: str | None, home: Path) -> argparse.ArgumentParser:
    """The parser that every study has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few minutes: fewer steps, seeds and examples")
    parser.add_argument("--out", type=Path, help=f"folder of results.json, .md, .png (default {home}; quick: runs/)")
    parser.add_argument("--work", type=Path, help="folder of finished cells (default runs/)")
    parser.add_argument("--force", action="store_true", help="replace results that are there")
    return parser


def places(args: argparse.Namespace, home: Path) -> tuple[Path, Path]:
    """Where results and finished cells go; leaves with status 2 if there are results already."""
    name = home.name + ("-quick" if args.quick else "")
    out = args.out or (ROOT / "runs" / name / "results" if args.quick else home)
    keep_existing(out / "results.json", args.force)
    return out, args.work or ROOT / "runs" / name / "cells"


def kept(folder: Path, load: Callable[[Path], M], train: Callable[[], M]) -> M:
    """The model that a stopped study left in `folder`, or a newly trained one, which is left there.

    Args:
        folder: one model's own.
        load: reads a folder that the model's `save_pretrained` wrote.
        train: makes the model where there is none.
    """
    if folder.exists():
        return load(folder)
    model = train()
    partial = folder.with_name(f".{folder.name}")
    model.save_pretrained(partial)
    partial.rename(folder)
    return model


def main(
    description: str | None,
    home: Path,
    settings: tuple[S, S],
    compute: Callable[[S, Path], dict[str, Any]],
    text: Callable[[dict[str, Any]], str],
    figure: Callable[[dict[str, Any]], Any],
    argv: Sequence[str] | None = None,
) -> None:
    """The command of a study: compute what is missing, write the results.

    Args:
        description: the module's docstring.
        home: the folder of the committed results.
        settings: of the full and of the quick form.
        compute: settings and the folder of finished cells to results.
        text: results to Markdown.
        figure: results to a matplotlib figure.
        argv: the command line.
    """
    args = arguments(description, home).parse_args(argv)
    out, work = places(args, home)
    result = compute(settings[1] if args.quick else settings[0], work)
    publish(out, result, text(result), figure(result))


def publish(out: Path, result: Mapping[str, Any], text: str, figure: Any) -> None:
    """Write the JSON, the table and the figure."""
    write_json(out / "results.json", {**result, "machine": machine()})
    write_text(out / "results.md", text)
    save_figure(figure, out / "results.png")
    print(text)
    print(f"wrote {out}/results.json, results.md, results.png")


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure at once, in 256 colours: a third of the bytes, and no eye sees it on lines and text."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, bbox_inches="tight", metadata={"Software": None}, format="png")
    with replacing(path) as (partial,), Image.open(drawn) as picture:
        few = picture.convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        few.save(partial, "PNG", optimize=True)


def canvas(rows: int, columns: int, width: float = 4.6, height: float = 3.6) -> tuple[Any, Any]:
    """A figure without a display, and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    for axis in axes.ravel():
        axis.spines[["top", "right"]].set_visible(False)
    figure.set_layout_engine("constrained")
    return figure, axes
