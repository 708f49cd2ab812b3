"""`skipguide segment`: masks of pictures by a UNet++, at the depth you choose."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipguide.cli import vision_models
from skipguide.cli.arguments import examples, number
from skipguide.cli.outputs import check_output, plain_arguments, replacing, sidecar, versions, write_json
from skipguide.errors import SkipError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

BUNDLED = "tiny-unetpp"
FOUND, MISSED, FALSE = (245, 158, 11), (37, 99, 235), (220, 38, 38)
PANEL = 288


def register(subparsers: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "segment",
        help="find things in pictures with a UNet++, at the depth you choose",
        description="Segment pictures with a UNet++ and write a sheet of overlays. Without pictures: a made-up one of "
        "cell nuclei, whose truth is known. A shallow head runs a part of the network only.",
        epilog=examples(
            "skipguide segment",
            "skipguide segment --head all -o heads.png",
            "skipguide segment cells.png more.png --model runs/mine/model --head 2 --masks masks/",
        ),
    )
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="pictures (default: a made-up one)")
    parser.add_argument("--truth", nargs="+", type=Path, metavar="MASK", help="their true masks, white inside")
    parser.add_argument(
        "--head",
        default="last",
        help="a level such as 2; last; mean; all; or adaptive: deeper only where two heads differ (default: last)",
    )
    parser.add_argument(
        "--seed", metavar="N", type=number(int, 0), default=7, help="of the made-up picture (default: 7)"
    )
    parser.add_argument("--size", metavar="N", type=number(int, 16, 2048), default=128, help="its side in pixels")
    parser.add_argument("--tile", metavar="N", type=number(int, 16), default=512, help="run larger pictures in tiles")
    parser.add_argument("--overlap", metavar="N", type=number(int, 0), default=64, help="pixels that tiles share")
    parser.add_argument("--masks", metavar="FOLDER", type=Path, help="also write NAME-mask.png and NAME-overlay.png")
    vision_models.add_model(parser, BUNDLED)
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, default=Path("segment.png"), help="a .png")
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Segment and draw."""
    check_output(args.output, (".png",), force=args.force)
    if not args.images and args.truth:
        raise SkipError("--truth belongs to pictures: name them, or leave both out for a made-up one")
    if args.truth and len(args.truth) != len(args.images):
        raise SkipError(f"expected one --truth for each of {len(args.images)} pictures; got {len(args.truth)}")
    if args.overlap > args.tile // 2:
        raise SkipError(f"expected --overlap of at most half of --tile; got {args.overlap} and {args.tile}")
    subjects = _subjects(args)
    extra = _mask_files(args, [name for name, _, _ in subjects])
    for path in extra:
        check_output(path, (".png",), force=args.force, notes=False)

    from skipguide.vision import UNetPlusPlus

    model, _ = vision_models.load(UNetPlusPlus, args.model, BUNDLED, args.device)
    if model.in_channels != 3:
        raise SkipError(f"{args.model} takes {model.in_channels} channels; this command feeds RGB pictures")
    if args.images and args.model == BUNDLED:
        print(
            f"skipguide: {BUNDLED} has learned cell nuclei and nothing else, from 398 micrographs and made-up ones, "
            "and is no medical device: for other things train on your pictures with python -m demos.unetpp.train "
            "--data FOLDER, and pass --model",
            file=sys.stderr,
        )
    heads = _heads(args.head, model)
    results = [_segment(model, picture, truth, heads, args) for _, picture, truth in subjects]
    from skipguide.media.sheets import contact_sheet

    whose = "as given" if args.images else "as it was drawn"
    columns, rows, captions = _sheet(subjects, results, whose)
    weights = sum(p.numel() for p in model.parameters())
    title = f"UNet++ ({args.model}), {weights:,} weights"
    if len(model.levels) > 1:
        title += f"; its heads L1 to L{model.levels[-1]} run more and more of the network"
    title += "\n"
    title += "orange: found"
    if any(truth is not None for _, _, truth in subjects):
        title += "; in the last column orange: right, blue: missed, red: nothing there"
    sheet = contact_sheet(rows, title=title, column_labels=columns, captions=captions)
    notes = {"arguments": plain_arguments(args), "versions": versions(), "results": [_record(r) for r in results]}
    with replacing(args.output, sidecar(args.output), *extra) as files:
        sheet.save(files[0])
        write_json(files[1], notes)
        for at, ((_, picture, _), result) in enumerate(zip(subjects, results, strict=True)):
            if extra:
                _save_masks(picture, result[-1], files[2 + 2 * at], files[3 + 2 * at])
    for (name, _, _), result in zip(subjects, results, strict=True):
        last = result[-1]
        iou = f", IoU {100 * last['iou']:.1f} %" if "iou" in last else ""
        print(f"{name}: {last['name']}, {100 * last['share']:.1f} % of the picture{iou}")
    print(f"{args.output}: {len(subjects)} picture{'s' * (len(subjects) > 1)}")


def _subjects(args: argparse.Namespace) -> list[tuple[str, Image, Tensor | None]]:
    if not args.images:
        from skipguide.media.frames import as_images
        from skipguide.vision.unetpp.nuclei import generate_nuclei

        nuclei, inside = generate_nuclei(args.seed, args.size)
        return [(f"made-up nuclei, seed {args.seed}", as_images(nuclei[None])[0], inside[0] > 0.5)]
    from skipguide.media.frames import open_picture
    from skipguide.vision.segmentation import inside_of

    found: list[tuple[str, Image, Tensor | None]] = []
    for at, path in enumerate(args.images):
        picture = open_picture(path)
        truth = None
        if args.truth:
            mask = open_picture(args.truth[at])
            if mask.size != picture.size:
                raise SkipError(f"{args.truth[at]} has {mask.size} pixels and {path} {picture.size}")
            truth = inside_of(mask, args.truth[at])
        found.append((path.name, picture, truth))
    return found


def _tensor(picture: Image) -> Tensor:
    """`[3, H, W]` in 0..1."""
    import numpy as np
    import torch

    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)


def _mask_files(args: argparse.Namespace, names: list[str]) -> list[Path]:
    if args.masks is None:
        return []
    stems = [Path(name).stem if args.images else f"nuclei-{args.seed}" for name in names]
    if len(set(stems)) < len(stems):
        raise SkipError(f"--masks names its files after the pictures, and two have the same name: {sorted(stems)}")
    return [args.masks / f"{stem}-{kind}.png" for stem in stems for kind in ("mask", "overlay")]


def _heads(text: str, model: Any) -> list[int | str]:
    if text == "all":
        return list(model.levels)
    if text == "last":
        return [model.levels[-1]]
    if text in ("mean", "adaptive"):
        return [text]
    if text.removeprefix("L").isdecimal():
        return [int(text.removeprefix("L"))]
    raise SkipError(f"expected --head out of {model.levels}, last, mean, adaptive or all; got {text!r}")


def _segment(
    model: Any, picture: Image, truth: Tensor | None, heads: list[int | str], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """What each head finds; how much of the network it ran."""
    import torch

    from skipguide.vision.segmentation import MaskMeter, predict_tiled

    device = next(model.parameters()).device
    found = []
    for head in heads:
        ran: dict[str, int] = {"rows": 0, "tiles": 0}

        def call(tiles: Tensor, head: int | str = head, ran: dict[str, int] = ran) -> Tensor:
            out = model.run(tiles, head)
            ran["rows"] += sum(out.rows_run.values())
            ran["tiles"] += len(tiles)
            return out.logits

        with torch.no_grad():
            pixels = _tensor(picture)[None].to(device)
            logits = predict_tiled(call, pixels, args.tile, args.overlap, progress=True).cpu()
        if bool(torch.isnan(logits).any()):
            raise SkipError(f"{args.model} answers NaN: check its weights")
        mask = (logits[0] > 0).any(0)
        name = f"head L{head}" if isinstance(head, int) else {"mean": "mean of the heads"}.get(head, f"{head} depth")
        entry: dict[str, Any] = {"head": head, "name": name, "mask": mask, "share": float(mask.float().mean())}
        entry["nodes"] = ran["rows"] / (ran["tiles"] * len(model.nodes()))
        if truth is not None:
            meter = MaskMeter(1)
            meter.update(torch.where(mask, 1.0, -1.0)[None, None], truth[None, None].float())
            entry["iou"] = meter.pooled_iou
        found.append(entry)
    return found


def _sheet(
    subjects: list[tuple[str, Image, Tensor | None]], results: list[list[dict[str, Any]]], whose: str
) -> tuple[list[str], list[list[Image | None]], list[list[str]]]:
    from skipguide.vision.segmentation import overlay

    known = any(truth is not None for _, _, truth in subjects)
    columns = ["input", *(f"prediction, {entry['name']}" for entry in results[0])]
    columns += ["truth", "mistakes of the prediction"] if known else []
    rows: list[list[Image | None]] = []
    captions = []
    for (name, picture, truth), entries in zip(subjects, results, strict=True):
        row: list[Image | None] = [_panel(picture)]
        caption = [name]
        for entry in entries:
            row.append(_panel(overlay(picture, entry["mask"], FOUND) if bool(entry["mask"].any()) else _faded(picture)))
            iou = f"IoU {100 * entry['iou']:.1f} %, " if "iou" in entry else ""
            share = (
                f"{100 * entry['share']:.1f} % of the picture found" if bool(entry["mask"].any()) else "nothing found"
            )
            caption.append(f"{share}, {iou}ran {100 * entry['nodes']:.0f} % of the nodes")
        if truth is not None:
            mask = entries[-1]["mask"]
            mistakes = overlay(picture, mask & truth, FOUND)
            mistakes = overlay(overlay(mistakes, truth & ~mask, MISSED, 0.8), mask & ~truth, FALSE, 0.8)
            row += [_panel(overlay(picture, truth, FOUND)), _panel(mistakes)]
            caption += [whose, f"of {entries[-1]['name']}"]
        rows.append(row)
        captions.append(caption)
    return columns, rows, captions


def _faded(picture: Image) -> Image:
    """A picture in which nothing was found: pale, so that it is not taken for the input."""
    from PIL import Image

    return Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, "white"), 0.6)


def _panel(picture: Image) -> Image:
    """Enlarged by a whole factor if it is small, reduced if it is large."""
    from PIL import Image

    side = max(picture.size)
    if side > 2 * PANEL:
        share = 1.5 * PANEL / side
        return picture.resize((max(1, round(picture.width * share)), max(1, round(picture.height * share))))
    zoom = max(1, round(PANEL / side))
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def _save_masks(picture: Image, entry: dict[str, Any], mask: Path, painted: Path) -> None:
    from PIL import Image

    from skipguide.vision.segmentation import overlay

    Image.fromarray((entry["mask"].numpy() * 255).astype("uint8")).save(mask)
    overlay(picture, entry["mask"], FOUND).save(painted)


def _record(result: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in entry.items() if key != "mask"} for entry in result]
