"""`skipguide sweep`: layers times scales on one sheet, for finding a preset."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipguide.cli import clip_job, models, pipeline_calls
from skipguide.cli.arguments import (
    GUIDANCE_FLAGS,
    add_guidance,
    add_model,
    add_output,
    add_sampling,
    examples,
    given,
    layer_numbers,
    number,
)
from skipguide.cli.clip_job import ClipJob
from skipguide.cli.file_locks import remove_leftovers
from skipguide.cli.outputs import check_output, read_json, replacing, sidecar, versions, write_json
from skipguide.cli.processes import Process, this_process
from skipguide.cli.sweep_cells import Cell, CellCache
from skipguide.errors import SkipError
from skipguide.files import fitting, landing
from skipguide.hosts.progress import progress_bar, say
from skipguide.media import pictures
from skipguide.pipelines.formulas import find_formula

if TYPE_CHECKING:
    from PIL.Image import Image

Row = tuple[int, ...]
SCALES = (0.5, 1.0, 2.0)


def register(subparsers: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "sweep",
        help="layers times scales on one contact sheet",
        description="Try layers (rows) and scales (columns) with one seed: a sheet and a table (CSV).\n"
        "Finished cells are kept in a folder next to the sheet; run the same command again to go on, or in several\n"
        "processes (accelerate launch) to share the cells.",
        epilog=examples(
            'skipguide sweep "a red circle moving right"',
            'skipguide sweep "a red circle moving right" --layers 3-8 --scales 0.5 1 2 4 -o circle.png',
            'skipguide sweep "a red circle moving right" --layers 5 7 5+7 --part attn_identity',
        ),
    )
    add_sampling(parser)
    add_model(parser)
    add_guidance(parser, layers=False)
    group = parser.add_argument_group("sweep")
    group.add_argument(
        "--layers",
        metavar="N",
        nargs="+",
        type=layer_rows,
        default=["all"],
        help="one row each: 5 7 or 5-7; 5+7 is one row that leaves out both (default: all)",
    )
    group.add_argument(
        "--scales",
        nargs="+",
        type=number(float),
        help="one column each (default: 0.5 1 2; with --formula uncond, which has no scale: 1)",
    )
    group.add_argument(
        "--cell-frames", metavar="N", type=number(int, 1), default=3, help="frames in a cell (default: %(default)s)"
    )
    group.add_argument("--fresh", action="store_true", help="make every cell anew")
    add_output(parser, "a .png; the table has the same name with .csv (default: named after the prompt)", clip=False)
    parser.set_defaults(run=run, fps=None)


def layer_rows(text: str) -> list[Row] | str:
    """Read one item of `--layers`: `all`, `5`, `5-7` (three rows) or `5+7` (one row)."""
    if text == "all":
        return text
    if "+" in text:
        return [tuple(layer for item in text.split("+") for layer in layer_numbers(item))]
    return [(layer,) for layer in layer_numbers(text)]


def run(args: argparse.Namespace) -> None:
    """Make the cells that are missing, then the sheet and the table."""
    process = this_process(args.device)
    args.force |= process.rank > 0  # the first process writes the sheet, and the others cannot be in its way
    if args.output is not None:
        check_output(args.output.with_suffix(".csv"), (".csv",), force=args.force, notes=False)
    job = replace(clip_job.prepare(args, ending="-sweep", suffixes=(".png",)), device=process.device)
    table = job.output.with_suffix(".csv")
    check_output(table, (".csv",), force=args.force, notes=False)
    cache = CellCache(job.output.with_name(fitting(job.output.stem, ".cells")))
    if args.fresh and process.world > 1:
        raise SkipError(f"--fresh would make every cell once per process: remove {cache.folder} instead")

    pipeline = job.load()
    rows = _rows(args.layers, pipeline)
    no_scale = "scale" in find_formula(args.formula or "stg").limits
    scales = list(dict.fromkeys(args.scales or ((1.0,) if no_scale else SCALES)))
    try:
        cells = _make(job, pipeline, rows, scales, cache, process)
    except KeyboardInterrupt:
        kept = len(list(cache.folder.glob("*.json")))
        raise KeyboardInterrupt(f"{kept} cells are kept in {cache.folder}; run the same command to go on") from None

    most = max((cell for cell, _ in cells[1:]), key=lambda cell: cell.difference)
    if process.rank == 0:
        notes = job.record(
            pipeline,
            guidance=given(args, GUIDANCE_FLAGS[2:]),
            layers=[list(row) for row in rows],
            scales=scales,
            seconds=round(sum(cell.seconds for cell, _ in cells), 3),
            stats=[{"layer": cell.name, "scale": cell.scale, **cell.stats} for cell, _ in cells],
        )
        _write(job, table, notes, _sheet(job, cells, rows, scales), [cell for cell, _ in cells], cache)
    if process.shows:
        print(f"{job.output} and {table}: {_count(rows, 'row')} of layers, {_count(scales, 'scale')}, seed {args.seed}")
        print(f"skip guidance: changes most with layer {most.name} at scale {most.scale:g} ({most.difference:.4f})")


def _write(
    job: ClipJob, table: Path, notes: dict[str, Any], picture: Image, cells: Sequence[Cell], cache: CellCache
) -> None:
    """The sheet, the table and the notes, all or none; once, if another process with the same cells was faster."""
    with cache.locks.hold("sheet", wait=True):
        for path in map(landing, (job.output, table, sidecar(job.output))):
            remove_leftovers(path.parent, path.stem)
        earlier = read_json(sidecar(job.output)) or {}
        if not job.args.force and earlier.get("stats") == notes["stats"]:
            return
        for path in (job.output, table):
            check_output(path, (path.suffix,), force=job.args.force, notes=path is job.output)
        with replacing(job.output, table, sidecar(job.output)) as (sheet_file, table_file, notes_file):
            picture.save(sheet_file)
            _write_table(table_file, cells)
            write_json(notes_file, notes)


def _rows(items: Sequence[list[Row] | str], pipeline: Any) -> list[Row]:
    from skipguide import find_blocks

    denoisers = models.denoisers(pipeline)
    if not denoisers:
        raise SkipError(f"{type(pipeline).__name__} has no denoiser that skip guidance knows")
    total = len(find_blocks(next(iter(denoisers.values()))))
    everything: list[Row] = [(layer,) for layer in range(total)]
    rows = [row for item in items for row in (everything if isinstance(item, str) else item)]
    return list(dict.fromkeys(rows))


def _make(
    job: ClipJob, pipeline: Any, rows: Sequence[Row], scales: Sequence[float], cache: CellCache, process: Process
) -> list[tuple[Cell, Image]]:
    """The plain cell, then every row's cells in turn."""
    args = job.args
    shared = given(args, GUIDANCE_FLAGS[2:])
    plans = [(row, scale, {**shared, "layers": list(row), "scale": scale}) for row in rows for scale in scales]
    guidances = [pipeline_calls.make_guidance(plan) for *_, plan in plans]
    # Counted beforehand for every cell: a layer that does not exist is refused now, not after an hour.
    costs = [float(guidance.cost(pipeline).ratio_to_plain) for guidance in guidances]
    settings = {
        "model": job.source.content_hash(),
        "call": job.call,
        "prompt": args.prompt,
        "image": str(args.image),
        "seed": args.seed,
        "device": job.device.partition(":")[0],
        "dtype": job.dtype,
        "cell_frames": args.cell_frames,
        "versions": versions(),
    }
    maker = _CellMaker(job, pipeline, cache, settings, fresh=args.fresh, shows=process.shows)
    todo = [_Todo(row, scale, plan, cost) for (row, scale, plan), cost in zip(plans, costs, strict=True)]
    keys = [maker.key(each) for each in todo]
    with progress_bar(what="sweep", total=1 + len(plans), unit="cell", show=process.shows, leave=True) as progress:
        # every other cell is compared with the plain clip: the first process makes it, the others wait for it
        with cache.locks.hold("plain", wait=True):
            plain = maker.plain()
        progress.update()

        def make(each: _Todo) -> None:
            say(progress, f"layer {each.name}, scale {each.scale:g}")
            maker.make(each, plain)

        cache.locks.share(process.order(todo), maker.key, maker.done, make, lambda each: progress.update())
    found = [cache.get(key) for key in (maker.plain_key, *keys)]
    if missing := [key for key, cell in zip(("plain", *keys), found, strict=True) if cell is None]:
        raise SkipError(f"cell {missing[0]} was removed from {cache.folder} while the sweep ran: run it again")
    return [cell for cell in found if cell is not None]


@dataclass(frozen=True)
class _Todo:
    """One cell that is asked for."""

    row: Row
    scale: float
    plan: dict[str, Any]
    cost: float

    @property
    def name(self) -> str:
        return "+".join(map(str, self.row))


class _CellMaker:
    """Makes cells and keeps them."""

    def __init__(
        self, job: ClipJob, pipeline: Any, cache: CellCache, settings: dict[str, Any], *, fresh: bool, shows: bool
    ) -> None:
        self.job = job
        self.pipeline = pipeline
        self.cache = cache
        self.settings = settings
        self.plain_key = cache.key("plain", settings)
        self.bar = {"leave": False, "position": 1, "disable": not shows}
        self._fresh = fresh
        self._made: set[str] = set()

    def key(self, each: _Todo) -> str:
        return self.cache.key(f"{each.name}-{each.scale:g}", {**self.settings, "guidance": each.plan})

    def done(self, each: _Todo) -> bool:
        key = self.key(each)
        return key in self._made or (not self._fresh and self.cache.get(key) is not None)

    def plain(self) -> list[Image]:
        """The frames of the plain clip; its lock must be held."""
        key = self.plain_key
        frames = None if self._fresh or self.cache.get(key) is None else self.cache.get_clip(key)
        if frames is not None:
            return frames
        sample = self._sample(None, "plain")
        self.cache.put_clip(key, sample.images)
        self._keep(key, Cell((), 0.0, 1.0, 0.0, round(sample.seconds, 3), {}), sample.images)
        return sample.images

    def make(self, each: _Todo, plain: Sequence[Image]) -> None:
        """One cell; its lock must be held."""
        sample = self._sample(pipeline_calls.make_guidance(each.plan), f"layer {each.name}")
        change = round(pictures.difference(plain, sample.images), 6)
        cell = Cell(each.row, each.scale, round(each.cost, 4), change, round(sample.seconds, 3), sample.stats)
        self._keep(self.key(each), cell, sample.images)

    def _sample(self, guidance: Any, desc: str) -> pipeline_calls.Sample:
        args = self.job.args
        bar = {"desc": desc, **self.bar}
        with models.few_threads(self.job.source, self.job.device):
            return pipeline_calls.sample(self.pipeline, args.prompt, self.job.call, args.seed, guidance, bar=bar)

    def _keep(self, key: str, cell: Cell, images: Sequence[Image]) -> None:
        self.cache.put(key, cell, _strip(images, self.job.args.cell_frames))
        self._made.add(key)


def _strip(images: Sequence[Image], count: int) -> Image:
    """A cell: a few frames of the clip, small."""
    return pictures.in_a_row(pictures.resized(pictures.pick(images, count), clip_job.SHEET_FRAME), gap=2)


def _sheet(
    job: ClipJob,
    cells: Sequence[tuple[Cell, Image]],
    rows: Sequence[Row],
    scales: Sequence[float],
) -> Image:
    """Rows of layers, columns of scales; each row starts with the plain clip, to compare with."""
    args = job.args
    (plain_cell, plain), rest = cells[0], cells[1:]
    width = len(scales)
    lines = [rest[i * width : (i + 1) * width] for i in range(len(rows))]
    settings = {"part": "block"} | given(args, GUIDANCE_FLAGS[2:])
    shared = ", ".join(f"{name} {value}" for name, value in settings.items())
    title = f"{args.prompt} (seed {args.seed}, {pipeline_calls.steps_of(job)} steps)\nskip guidance, {shared}"
    return pictures.contact_sheet(
        [[plain, *(image for _, image in line)] for line in lines],
        title=title,
        row_labels=[f"layer {'+'.join(map(str, row))}" for row in rows],
        column_labels=["plain", *(f"scale {scale:g}" for scale in scales)],
        captions=[
            [f"{plain_cell.seconds:.1f} s"]
            + [f"cost x{cell.relative_cost:.2f}, change {cell.difference:.3f}" for cell, _ in line]
            for line in lines
        ],
    )


def _count(items: Sequence[Any], what: str) -> str:
    return f"{len(items)} {what}{'s' * (len(items) != 1)}"


def _write_table(path: Path, cells: Sequence[Cell]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "scale", "relative_cost", "difference", "seconds"])
        writer.writerows([c.name, c.scale, c.relative_cost, c.difference, c.seconds] for c in cells)
