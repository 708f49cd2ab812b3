"""`skipguide floorplan`: rooms drawn from walls and a layout graph."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipguide.cli import vision_models
from skipguide.cli.arguments import Default, examples, number
from skipguide.cli.outputs import check_output, plain_arguments, replacing, sidecar, versions, write_json
from skipguide.errors import SkipError
from skipguide.hosts.progress import progress_bar

if TYPE_CHECKING:
    from PIL.Image import Image

    from skipguide.vision.floorplan import Plan

BUNDLED = "tiny-floorplan"
MADE_UP = Default(200_000)
MOST = 8


def register(subparsers: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "floorplan",
        help="draw the rooms of a plan from its walls and its layout graph",
        description="Draw the rooms of floor plans from their walls and their layout graphs, with a legend and the "
        "rooms' names. Without --data: a made-up plan, whose truth is known.",
        epilog=examples(
            "skipguide floorplan",
            "skipguide floorplan --seed 12 --programme clinic -o clinic.png",
            "skipguide floorplan --data msd/train --plans 1234 1240 --side 128 --model runs/msd/model",
        ),
    )
    parser.add_argument(
        "--seed", metavar="N", type=number(int, 0), default=MADE_UP, help="of the made-up plan (default: %(default)s)"
    )
    parser.add_argument("--programme", choices=("family", "office", "clinic"), help="of the made-up plan")
    parser.add_argument(
        "--data", metavar="FOLDER", type=Path, help="Modified Swiss Dwellings: struct_in, graph_in and maybe full_out"
    )
    parser.add_argument("--plans", nargs="+", metavar="ID", help="which plans of --data (default: the first)")
    parser.add_argument("--side", metavar="N", type=number(int, 24, 1024), help="pixels to reduce --data to")
    parser.add_argument("--gap", metavar="N", type=number(int, 0), default=0, help="close openings of the outer walls")
    parser.add_argument("--submission", metavar="FOLDER", type=Path, help="also write ID.png as the challenge wants")
    vision_models.add_model(parser, BUNDLED)
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, default=Path("floorplan.png"), help="a .png")
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Draw."""
    check_output(args.output, (".png",), force=args.force)
    plans = _plans(args)
    extra = [] if args.submission is None else [args.submission / f"{plan.name}.png" for plan in plans]
    for path in extra:
        check_output(path, (".png",), force=args.force, notes=False)

    import torch

    from skipguide.media.sheets import banner, stacked
    from skipguide.vision.floorplan import FloorPlanNet, submission_image
    from skipguide.vision.floorplan.plan import as_classes

    net, device = vision_models.load(FloorPlanNet, args.model, BUNDLED, args.device)
    pictures, records, classes = [], [], []
    for plan in progress_bar(plans, "plans", show=len(plans) > 1):
        graphs = None if net.graph is None else [plan.graph]
        with torch.no_grad():
            found = as_classes(net(plan.image[None].to(device), graphs)[0])
        classes.append(found)
        record = _record(plan, found)
        records.append(record)
        pictures.append(_picture(plan, found, record))
        print(f"{plan.name}: {len(plan.graph)} rooms{_score(record)}")
    weights = sum(p.numel() for p in net.parameters())
    title = f"Floor plans from walls and a layout graph ({args.model}, {weights:,} weights); %: share of the floor"
    sheet = stacked([banner(title, max(p.width for p in pictures), 17), *pictures], gap=10)
    notes = {"arguments": plain_arguments(args), "versions": versions(), "plans": records}
    with replacing(args.output, sidecar(args.output), *extra) as files:
        sheet.save(files[0])
        write_json(files[1], notes)
        for path, found in zip(files[2:], classes, strict=False):  # no files, or one for each plan
            submission_image(found).save(path)
    print(f"{args.output}: {len(plans)} plan{'s' * (len(plans) > 1)}")


def _plans(args: argparse.Namespace) -> list[Plan]:
    from skipguide.vision.floorplan import MSDFolder, generate_plan

    if args.data is None:
        if args.plans or args.side or args.gap:
            raise SkipError("--plans, --side and --gap belong to --data; a made-up plan has --seed and --programme")
        return [generate_plan(args.seed, programme=args.programme)]
    if not isinstance(args.seed, Default) or args.programme:
        raise SkipError("--seed and --programme belong to a made-up plan; of --data choose with --plans")
    folder = MSDFolder(args.data, args.side, args.gap)
    wanted = args.plans or folder.ids[:1]
    if missing := sorted(set(wanted) - set(folder.ids)):
        raise SkipError(f"{args.data} has no plan {missing[0]!r}; it has {len(folder)}, such as {folder.ids[:3]}")
    if len(set(wanted)) < len(wanted):
        raise SkipError(f"expected each of --plans once; got {' '.join(wanted)}")
    if len(wanted) > MOST:
        raise SkipError(f"expected at most {MOST} --plans on one sheet; got {len(wanted)}")
    return [folder[folder.ids.index(name)] for name in wanted]


def _record(plan: Plan, found: Any) -> dict[str, Any]:
    from skipguide.vision.floorplan import CLASSES, IGNORE, STRUCTURE
    from skipguide.vision.segmentation import ClassMeter

    record: dict[str, Any] = {"name": plan.name, "rooms": len(plan.graph)}
    if plan.target is not None:
        meter = ClassMeter(len(CLASSES), IGNORE)
        meter.update(found[None], plan.target[None])
        floor = plan.target < STRUCTURE
        right = float((found == plan.target)[floor].float().mean()) if bool(floor.any()) else float("nan")
        record |= {"miou": meter.mean_iou, "accuracy": meter.accuracy, "floor_right": right}
    return record


def _score(record: dict[str, Any]) -> str:
    if "accuracy" not in record:
        return ""
    return f", {100 * record['floor_right']:.0f} % of the floor right (pixels with the right room)"


def _picture(plan: Plan, found: Any, record: dict[str, Any]) -> Image:
    """Walls, graph, prediction and truth side by side."""
    from PIL import Image

    from skipguide.media.frames import as_images, comfortable_zoom
    from skipguide.media.sheets import PAPER, in_a_row, label
    from skipguide.vision.floorplan import draw_graph, draw_plan

    walls = as_images(plan.image[2].repeat(3, 1, 1)[None])[0]
    zoom = comfortable_zoom(walls.height, 352)
    walls = walls.resize((walls.width * zoom, walls.height * zoom), Image.Resampling.NEAREST)
    framed = Image.new("RGB", (walls.width + 2, walls.height + 2), (113, 113, 122))
    framed.paste(walls, (1, 1))
    parts = [
        label(framed, f"input 1: the walls of plan {plan.name}"),
        label(draw_graph(plan.graph, 300), "input 2: its layout graph"),
        label(draw_plan(found, height=352), f"prediction{_score(record)}"),
    ]
    if plan.target is not None:
        parts.append(label(draw_plan(plan.target, height=352), "truth"))
    tallest = max(part.height for part in parts)
    even = []
    for part in parts:
        canvas = Image.new("RGB", (part.width, tallest), PAPER)
        canvas.paste(part, (0, 0))
        even.append(canvas)
    return in_a_row(even, gap=20)
