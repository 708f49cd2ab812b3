"""`skipguide explain`: which parts of a picture a classifier's answer rests on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from skipguide.cli.arguments import examples, number
from skipguide.cli.models import choose_device
from skipguide.cli.outputs import check_output, replacing, sidecar, versions, write_json
from skipguide.errors import SkipError

METHODS = ("lime", "occlusion", "rise")
FILLS = ("neighbours", "zeros", "partial", "black", "grey", "mean", "blur", "noise")


def register(subparsers: Any) -> None:
    """Add the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "explain",
        help="which parts of a picture a classifier's answer rests on",
        description="Hide parts of a picture from every layer of a classifier and see what the answer rests on: the "
        "attribution, the picture without its first segments and with nothing else, and what painting them over "
        "would have said.",
        epilog=examples(
            "skipguide explain demos/layer_masking/scenes/star.png",
            "skipguide explain cat.jpg --model resnet50 --segments slic:60",
            "skipguide explain cat.jpg --model convnext_tiny --method occlusion -o cat-explained.png",
        ),
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help="a picture")
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="tiny-cnn",
        help="the bundled tiny-cnn, a folder that timm wrote, or a name of timm or torchvision (default: %(default)s)",
    )
    group.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="weights of your own for --model: .pth, .pt or .safetensors"
    )
    group.add_argument("--random-weights", action="store_true", help="do not load weights, for a try without network")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes the best there is")
    group = parser.add_argument_group("explanation")
    group.add_argument("--method", choices=METHODS, default="lime", help="default: %(default)s")
    group.add_argument(
        "--segments",
        default="grid:8",
        metavar="KIND:N",
        help="grid:N patches a side or slic:N superpixels (%(default)s)",
    )
    group.add_argument("--fill", choices=FILLS, default="neighbours", help="what hidden regions are (%(default)s)")
    group.add_argument("--target", type=number(int, 0), metavar="N", help="the class to explain (default: predicted)")
    group.add_argument("--samples", type=number(int, 2), default=512, metavar="N", help="masks (default: %(default)s)")
    group.add_argument(
        "--top",
        type=number(float, 0, 1),
        default=0.15,
        metavar="X",
        help="share of segments to leave out (%(default)s)",
    )
    group.add_argument(
        "--seed", type=number(int, 0), default=0, metavar="N", help="of the masks (default: %(default)s)"
    )
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", type=Path, metavar="FILE", help=".png (default: IMAGE-explained.png, here)")
    group.add_argument("--force", action="store_true", help="replace a file that exists")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Explain one picture."""
    output = args.output or Path(f"{args.image.stem}-explained.png")
    check_output(output, (".png",), force=args.force)
    if args.checkpoint is not None and args.random_weights:
        raise SkipError("--checkpoint brings weights and --random-weights wants none: give one of them")
    if not args.image.is_file():
        raise SkipError(f"no file {args.image}: expected a picture")

    device = choose_device(args.device)
    from skipguide.media.frames import open_picture
    from skipguide.vision.layer_masking.classifiers import load_classifier
    from skipguide.vision.layer_masking.explain import draw, explain

    picture = open_picture(args.image)
    classifier = load_classifier(args.model, pretrained=not args.random_weights, checkpoint=args.checkpoint)
    classifier.model.to(device)
    explanation = explain(
        classifier,
        classifier.prepare(picture),
        method=args.method,
        segments=args.segments,
        fill=args.fill,
        target=args.target,
        samples=args.samples,
        top=args.top,
        seed=args.seed,
        progress=True,
    )
    box = classifier.seen(picture.size)
    note = "" if box == (0, 0, *picture.size) else _cropped(picture.size, box)
    numbers = explanation.numbers | {"image": str(args.image), "seen": list(box), "versions": versions()}
    sheet = draw(explanation, classifier, note=note)
    with replacing(output, sidecar(output)) as (drawn, notes):
        sheet.save(drawn)
        write_json(notes, numbers)
    target, tests = numbers["target"], numbers["tests"]
    gone = tests.get(args.fill, tests["neighbours"])["without_top"]
    print(
        f"{output}: {target['label']} ({target['probability']:.2f}) rests on segments "
        f"{', '.join(map(str, numbers['top_segments'][:6]))}; without the first {len(numbers['top_segments'])} "
        f"it is {gone['label']} ({gone['its_probability']:.2f}); {numbers['masks']} masks"
    )
    if note:
        print(note)


def _cropped(size: tuple[int, int], box: tuple[int, int, int, int]) -> str:
    left, top, right, bottom = box
    return (
        f"of the {size[0]}x{size[1]} picture the model sees columns {left} to {right} and rows {top} to {bottom}: what "
        "lies outside was cropped, and nothing is said of it"
    )
