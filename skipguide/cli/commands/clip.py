"""`skipguide clip tune | eval | predict`: adapt CLIP to a folder of images, and use what came out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from skipguide.cli.arguments import examples
from skipguide.cli.models import loading
from skipguide.errors import SkipError
from skipguide.files import landing

BUNDLED_CLIP = "tiny-clip"
BUNDLED_RATE = 1e-3  # tried by hand on the bundled model, not chosen by a study; real CLIPs want the reference's 2e-5


def register(subparsers: Any) -> None:
    """Add the command and its three actions."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "clip",
        help="adapt CLIP to a folder of images (Skip Tuning), evaluate it, ask it",
        description="Skip Tuning: adapt CLIP to a few images of some classes, training only the later layers.",
        epilog=examples(
            "skipguide clip tune photos/train -o adapter",
            "skipguide clip eval photos/test --adapter adapter",
            "skipguide clip predict photo.png --adapter adapter",
        ),
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    tune = actions.add_parser(
        "tune",
        help="a folder of images in, an adapter out",
        description="Adapt CLIP to the classes of a folder and write an adapter. The layers before --skip-layers are\n"
        "frozen and run once for each image; the given model is not changed.",
        epilog=examples(
            "skipguide clip tune photos/train -o adapter",
            "skipguide clip tune photos/train --shots 8 --model openai/clip-vit-base-patch16 -o adapter",
            "skipguide clip tune photos/train --augment --checkpoint run -o adapter --merge tuned-clip",
        ),
    )
    tune.add_argument("data", type=Path, help="folder with one folder of images per class")
    tune.add_argument("-o", "--out", type=Path, required=True, help="folder of the adapter")
    tune.add_argument("--shots", type=int, help="images per class (default: all)")
    tune.add_argument("--epochs", type=int, default=20, help="default: %(default)s")
    tune.add_argument("--batch", type=int, default=4, help="images per step (default: %(default)s)")
    tune.add_argument("--lr", type=float, help="of the text tower (default: 2e-5; 1e-3 for the bundled model)")
    tune.add_argument("--image-lr", type=float, help="of the image tower (default: a quarter of --lr)")
    tune.add_argument("--skip-layers", type=int, help="blocks without gradient in each tower (default: half)")
    tune.add_argument("--all-classes", action="store_true", help="compare with all classes in every step")
    tune.add_argument("--augment", action="store_true", help="random crops and flips, four views of every image")
    tune.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    tune.add_argument("--cache", choices=("auto", "device", "host", "disk"), default="auto", help="of the features")
    tune.add_argument("--cache-dir", type=Path, help="folder of features on disk")
    tune.add_argument("--checkpoint", type=Path, help="folder of the checkpoint; a killed run goes on from it")
    tune.add_argument("--merge", type=Path, metavar="FOLDER", help="also write the whole tuned model, as a stock one")
    tune.add_argument("--force", action="store_true", help="replace an adapter that exists")
    evaluate = actions.add_parser(
        "eval",
        help="accuracy on a folder of images",
        description="Print the accuracy of an adapter, or of CLIP without one, on the classes of a folder.",
        epilog=examples(
            "skipguide clip eval photos/test --adapter adapter",
            "skipguide clip eval photos/all --adapter adapter --base-new -o table.md",
        ),
    )
    evaluate.add_argument("data", type=Path, help="folder with one folder of images per class")
    evaluate.add_argument("--base-new", action="store_true", help="classes the adapter does not know are the new ones")
    evaluate.add_argument("-o", "--out", type=Path, help="also write the base/new table (.csv or .md)")
    evaluate.add_argument("--force", action="store_true", help="replace a table that exists")
    predict = actions.add_parser(
        "predict",
        help="the most likely classes of images",
        description="Print the most likely classes of images, among those of an adapter or of --classes.",
        epilog=examples(
            "skipguide clip predict photo.png --adapter adapter",
            'skipguide clip predict a.png b.png --classes "red circle,blue star" --topk 2',
        ),
    )
    predict.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    predict.add_argument("--topk", type=int, default=5, help="default: %(default)s")
    predict.add_argument("--classes", help="comma-separated class names instead of the adapter's")
    for action in (evaluate, predict):
        action.add_argument("--adapter", type=Path, help="folder that `clip tune` wrote; without one: zero-shot")
    parser.set_defaults(run=run)
    for action in (tune, evaluate, predict):
        action.add_argument(
            "--model", default=BUNDLED_CLIP, help="bundled name, folder or hub id (default: %(default)s)"
        )
        action.add_argument("--template", help='prompt with {} for the class (default: "a photo of a {}.")')
        action.add_argument("--device", help="default: cuda if there is one")


def run(args: argparse.Namespace) -> None:
    """Do what the action says."""
    {"tune": run_tune, "eval": run_eval, "predict": run_predict}[args.action](args)


def _load(args: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    import torch
    from transformers import AutoModel, AutoProcessor
    from transformers.utils import logging as noise

    from skipguide.assets import bundled

    noise.disable_progress_bar()
    source = bundled(BUNDLED_CLIP) if args.model == BUNDLED_CLIP else args.model
    with loading(args.model, "a CLIP"):
        model = AutoModel.from_pretrained(source)
        processor = AutoProcessor.from_pretrained(source)
    more: dict[str, Any] = {"device": args.device or ("cuda" if torch.cuda.is_available() else "cpu")}
    if args.template is not None:
        more["templates"] = args.template
    return model, processor, more


def _tuner(args: argparse.Namespace, classnames: list[str] | None) -> Any:
    from skipguide.vision.skip_tuning import SkipTuner

    model, processor, more = _load(args)
    if args.adapter is not None:
        return SkipTuner.from_adapter(model, processor, args.adapter, **more)
    if classnames is None:
        raise SkipError("expected --adapter or --classes, to know the class names")
    return SkipTuner(model, processor, classnames, **more)


def run_tune(args: argparse.Namespace) -> None:
    """Adapt, and write the adapter."""
    from skipguide.vision.skip_tuning import ClassSkip, SkipTuner
    from skipguide.vision.skip_tuning.adapter import FILE
    from skipguide.vision.skip_tuning.inputs import read_folder

    if (args.out / FILE).exists() and not args.force:
        raise SkipError(f"{args.out / FILE} exists already: choose another folder with -o, or replace it with --force")
    if args.merge is not None and args.merge.exists() and not args.force:
        raise SkipError(f"{args.merge} exists already: choose another folder with --merge, or replace it with --force")
    examples_ = read_folder(args.data)
    model, processor, more = _load(args)
    skip = None if args.all_classes else ClassSkip()
    tuner = SkipTuner(model, processor, examples_.names, args.skip_layers, skip, **more)
    rate = args.lr or (BUNDLED_RATE if args.model == BUNDLED_CLIP else 2e-5)
    report = tuner.fit(
        examples_,
        shots=args.shots,
        epochs=args.epochs,
        batch_size=args.batch,
        lr_text=rate,
        lr_image=args.image_lr or rate / 4,
        warmup_lr=rate / 20,
        seed=args.seed,
        augment="crop" if args.augment else None,
        views=4 if args.augment else 1,
        cache=args.cache,
        cache_dir=args.cache_dir,
        checkpoint_dir=args.checkpoint,
    )
    tuner.save_adapter(args.out, overwrite=args.force)
    count = len(examples_.names)
    print(f"{args.out}: {count} class{'es' * (count > 1)}, {report}")
    if args.merge is not None:
        merged = landing(args.merge)
        tuner.merge().save_pretrained(merged)  # type: ignore[operator]
        processor.save_pretrained(merged)
        print(f"{args.merge}: the whole tuned model")


def run_eval(args: argparse.Namespace) -> None:
    """Print accuracy, or the base/new table."""
    from skipguide.vision.skip_tuning.inputs import read_folder
    from skipguide.vision.skip_tuning.labels import plain

    data = read_folder(args.data)
    tuner = _tuner(args, data.names)
    if args.base_new:
        if args.adapter is None:
            raise SkipError("expected --adapter with --base-new: the adapter's classes are the base classes")
        known = {plain(name) for name in tuner.classnames}
        new = [name for name in data.names if plain(name) not in known]
        if not new:
            raise SkipError(f"expected classes in {args.data} that the adapter was not trained on; there are none")
        table = tuner.evaluate_base_new(data, new, label=str(args.adapter))
        if args.out is not None:
            table.save(args.out, overwrite=args.force)
        print(table.to_markdown(), end="")
        return
    found = tuner.evaluate(data)
    for name, accuracy in found.per_class.items():
        print(f"{100 * accuracy:6.2f} %  {name}")
    print(f"{100 * found.accuracy:6.2f} %  of {found.count} images")


def run_predict(args: argparse.Namespace) -> None:
    """Print the best classes of every image."""
    from skipguide.media.frames import open_picture

    names = [name.strip() for name in args.classes.split(",")] if args.classes else None
    tuner = _tuner(args, names)
    for path in args.images:
        best = tuner.predict(open_picture(path), args.topk, names)
        print(f"{path}: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in best))
