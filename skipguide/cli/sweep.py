"""`skipguide sweep`: layers times scales on one sheet, for finding a preset."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipguide import pictures
from skipguide.cli import jobs, models, sampling
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
from skipguide.cli.cells import Cell, CellCache
from skipguide.cli.outputs import check_output, replacing, sidecar, versions, write_json
from skipguide.errors import SkipError

if TYPE_CHECKING:
    from PIL.Image import Image

Row = tuple[int, ...]


def register(subparsers: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "sweep",
        help="layers times scales on one contact sheet",
        description="Try layers (rows) and scales (columns) with one seed: a sheet and a table (CSV).\n"
        "Finished cells are kept in a folder next to the sheet; run the same command again to go on.",
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
        default=[0.5, 1.0, 2.0],
        help="one column each (default: 0.5 1 2)",
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
    if args.output is not None:
        check_output(args.output.with_suffix(".csv"), (".csv",), force=args.force, notes=False)
    job = jobs.prepare(args, ending="-sweep", suffixes=(".png",))
    table = job.output.with_suffix(".csv")
    check_output(table, (".csv",), force=args.force, notes=False)
    cache = CellCache(job.output.with_name(f"{job.output.stem}.cells"))

    pipeline = job.load()
    rows = _rows(args.layers, pipeline)
    scales = list(dict.fromkeys(args.scales))
    try:
        cells = _make(job, pipeline, rows, scales, cache)
    except KeyboardInterrupt:
        kept = len(list(cache.folder.glob("*.json")))
        raise KeyboardInterrupt(f"{kept} cells are kept in {cache.folder}; run the same command to go on") from None

    notes = job.record(
        pipeline,
        guidance=given(args, GUIDANCE_FLAGS[2:]),
        layers=[list(row) for row in rows],
        scales=scales,
        seconds=round(sum(cell.seconds for cell, _ in cells), 3),
        stats=[{"layer": cell.name, "scale": cell.scale, **cell.stats} for cell, _ in cells],
    )
    with replacing(job.output, table, sidecar(job.output)) as (sheet_file, table_file, notes_file):
        _sheet(args, cells, rows, scales).save(sheet_file)
        _write_table(table_file, [cell for cell, _ in cells])
        write_json(notes_file, notes)
    print(f"{job.output} and {table}: {len(rows)} rows of layers, {len(scales)} scales, seed {args.seed}")
    most = max((cell for cell, _ in cells[1:]), key=lambda cell: cell.difference)
    print(f"skip guidance: changes most with layer {most.name} at scale {most.scale:g} ({most.difference:.4f})")


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
    job: jobs.Job, pipeline: Any, rows: Sequence[Row], scales: Sequence[float], cache: CellCache
) -> list[tuple[Cell, Image]]:
    """The plain cell, then every row's cells in turn."""
    from tqdm.auto import tqdm

    args = job.args
    shared = given(args, GUIDANCE_FLAGS[2:])
    plans = [(row, scale, {**shared, "layers": list(row), "scale": scale}) for row in rows for scale in scales]
    guidances = [sampling.make_guidance(plan) for *_, plan in plans]
    # Counted beforehand for every cell: a layer that does not exist is refused now, not after an hour.
    costs = [float(guidance.cost(pipeline).ratio_to_plain) for guidance in guidances]
    settings = {
        "model": job.source.fingerprint(),
        "call": job.call,
        "prompt": args.prompt,
        "image": str(args.image),
        "seed": args.seed,
        "device": job.device,
        "dtype": job.dtype,
        "cell_frames": args.cell_frames,
        "versions": versions(),
    }
    bar = {"leave": False, "position": 1}
    with tqdm(total=1 + len(plans), desc="sweep", unit="cell") as progress:
        plain_key = cache.key("plain", settings)
        plain = None if args.fresh else cache.get_clip(plain_key)
        found = cache.get(plain_key) if plain else None
        if plain is None or found is None:
            sample = sampling.sample(pipeline, args.prompt, job.call, args.seed, bar={"desc": "plain", **bar})
            plain = sample.images
            found = Cell((), 0.0, 1.0, 0.0, round(sample.seconds, 3), {}), _strip(plain, args.cell_frames)
            cache.put_clip(plain_key, plain)
            cache.put(plain_key, *found)
        cells = [found]
        progress.update()
        for (row, scale, plan), guidance, cost in zip(plans, guidances, costs, strict=True):
            name = "+".join(map(str, row))
            progress.set_postfix_str(f"layer {name}, scale {scale:g}")
            key = cache.key(f"{name}-{scale:g}", {**settings, "guidance": plan})
            found = None if args.fresh else cache.get(key)
            if found is None:
                desc = f"layer {name}"
                sample = sampling.sample(
                    pipeline, args.prompt, job.call, args.seed, guidance, bar={"desc": desc, **bar}
                )
                change = round(pictures.difference(plain, sample.images), 6)
                cell = Cell(row, scale, round(cost, 4), change, round(sample.seconds, 3), sample.stats)
                found = cell, _strip(sample.images, args.cell_frames)
                cache.put(key, *found)
            cells.append(found)
            progress.update()
    return cells


def _strip(images: Sequence[Image], count: int) -> Image:
    """A cell: a few frames of the clip, small."""
    return pictures.in_a_row(pictures.resized(pictures.pick(images, count), jobs.SHEET_FRAME), gap=2)


def _sheet(
    args: argparse.Namespace,
    cells: Sequence[tuple[Cell, Image]],
    rows: Sequence[Row],
    scales: Sequence[float],
) -> Image:
    """Rows of layers, columns of scales; each row starts with the plain clip, to compare with."""
    (plain_cell, plain), rest = cells[0], cells[1:]
    width = len(scales)
    lines = [rest[i * width : (i + 1) * width] for i in range(len(rows))]
    shared = ", ".join(f"{name} {value}" for name, value in given(args, GUIDANCE_FLAGS[2:]).items())
    title = f"{args.prompt} (seed {args.seed})\nskip guidance{f', {shared}' if shared else ''}"
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


def _write_table(path: Path, cells: Sequence[Cell]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "scale", "relative_cost", "difference", "seconds"])
        writer.writerows([c.name, c.scale, c.relative_cost, c.difference, c.seconds] for c in cells)
