"""UNet++ on its paper's data: the nuclei of the 2018 Data Science Bowl, 96 pixels, against U-Nets.

    nice -n 19 python -m demos.real.nuclei            # five seeds of 60 epochs of four models: an hour of a core each
    nice -n 19 python -m demos.real.nuclei --seeds 0  # one of them; two processes may share the seeds
    nice -n 19 python -m demos.real.nuclei --short    # one seed, 8 epochs, 8 to 128: ten minutes; nuclei-short.json
    nice -n 19 python -m demos.real.nuclei --quick    # one seed, a few steps; results in runs/

The study of `demos.unetpp.study` on `../shared/data/nuclei`: the same four models and controls, learning rates chosen
alike on one seed, the head chosen on validation pictures, a fixed split of 60, 20 and 20 % of the 664 pictures. They
are brought to 96 × 96, as published, and turned and mirrored. Widths are 16 to 256; the paper's, 32 to 512, take ten
times as long (`--published-widths`). What was measured of a finished training is a cell of `demos/real/nuclei/`, small
enough to be committed: a run on another machine goes on from there. The networks stay in `runs/`, those in training
too. Training is in bfloat16 where the machine multiplies in it, in half of the time, and every cell says which it was;
everything is measured in float32.

The paper, IoU: U-Net 90.8, wide U-Net 90.9, UNet++ 92.6, with deep supervision 92.5; head L3 at −32 % time for −0.6.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from demos import study
from demos.real.pictures import data_file
from demos.real.weights import NotInstalledError
from demos.training import fast_precision
from demos.unetpp import study as unetpp
from demos.unetpp.data import Pictures
from skipguide.files import replacing
from skipguide.media.frames import as_rgb
from skipguide.media.sheets import in_a_row, label, stacked
from skipguide.vision.segmentation import overlay

HOME = Path(__file__).with_suffix("")
OUT = Path(__file__).with_suffix(".json")
SPLIT = (0.6, 0.2, 0.2)
FULL = unetpp.Settings(
    seeds=(0, 1, 2, 3, 4), rates=(3e-4, 1e-3, 3e-3), steps=1500, tuning_steps=300, batch=16, size=96,
    train=398, validation=133, test=133,
    widths=(16, 32, 64, 128, 256), wide=(18, 35, 69, 138, 277),
)  # fmt: skip
PUBLISHED = replace(FULL, seeds=(0,), widths=(32, 64, 128, 256, 512), wide=(35, 70, 140, 280, 560))
# a fifth of the epochs in batches of half the size, half the widths, one seed, two learning rates
SHORT = replace(
    FULL,
    seeds=(0,),
    rates=(1e-3, 3e-3),
    steps=400,
    tuning_steps=100,
    batch=8,
    rounds=9,
    widths=(8, 16, 32, 64, 128),
    wide=(9, 17, 34, 69, 139),
)
QUICK = replace(
    FULL,
    seeds=(0,),
    rates=(1e-3,),
    steps=30,
    tuning_steps=1,
    rounds=3,
    widths=(4, 8, 12, 16, 24),
    wide=(5, 9, 14, 18, 28),
)


def read(size: int | None, most: int | None = None) -> Pictures:
    """The pictures and masks of `../shared/data/nuclei`, brought to `size` × `size`, or in their own sizes.

    Raises:
        NotInstalledError: where they are not there.
    """
    images, masks, names = [], [], []
    with np.load(data_file("nuclei/nuclei.npz")) as data:
        files = {
            key: (data[key].tobytes(), data[offsets])
            for key, offsets in (("jpeg", "offsets"), ("mask_png", "mask_offsets"))
        }
    count = len(files["jpeg"][1]) - 1
    for number in range(count if most is None else min(most, count)):
        picture, mask = (_opened(*files[key], number) for key in ("jpeg", "mask_png"))
        images.append(_resized(_values(as_rgb(picture, Path(f"nuclei-{number}"))), size))
        inside = _values(mask.convert("L")) >= 0.5
        # a pixel is inside where at least half of it is
        masks.append((_resized(inside.float(), size) >= 0.5).float())
        names.append(f"nuclei-{number}")
    return Pictures(images, masks, names)


def _opened(data: bytes, offsets: Any, number: int) -> Image.Image:
    return Image.open(io.BytesIO(data[offsets[number] : offsets[number + 1]]))


def _values(picture: Image.Image) -> Tensor:
    """`[C, H, W]` in 0..1; masks of ones are as good as those of 255."""
    values = torch.from_numpy(np.asarray(picture, dtype=np.float32).copy())
    values = values[None] if values.ndim == 2 else values.permute(2, 0, 1)
    return values / max(1.0, 255.0 if float(values.max()) > 1 else 1.0)


def _resized(values: Tensor, size: int | None) -> Tensor:
    if size is None:
        return values
    return F.interpolate(values[None], (size, size), mode="bilinear", antialias=True)[0]


def parts(size: int | None, most: int | None = None) -> tuple[Pictures, Pictures, Pictures]:
    """To train on, to choose on and to report: a fixed split of all that there are, mixed by a fixed seed."""
    every = read(size, most)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0)).tolist()
    first, second = round(SPLIT[0] * len(every)), round((SPLIT[0] + SPLIT[1]) * len(every))
    return every.pick(order[:first]), every.pick(order[first:second]), every.pick(order[second:])


class Study(unetpp.Study):
    """The study of U-Nets on real pictures."""

    def pictures(self) -> tuple[Pictures, Pictures, Pictures]:
        """A fixed split of all that there are."""
        s = self.settings
        return parts(s.size, s.train + s.validation + s.test)


@torch.no_grad()
def pictures(plan: unetpp.Study, result: dict[str, Any], rows: int = 4) -> Image.Image | None:
    """The first test pictures as they are, with the true nuclei, and with those that every model finds.

    None where the networks are not here: a run that goes on from committed cells has not trained them.
    """
    steps, seed = plan.settings.steps, result["settings"]["seeds"][0]
    which = {name: (name, seed, about["lr"], steps) for name, about in result["models"].items()}
    if not all(plan.place(*trained).exists() for trained in which.values()):
        return None
    models = {name: plan.trained(*trained) for name, trained in which.items()}
    lines = []
    for image, mask in list(zip(plan.test.images, plan.test.masks, strict=True))[:rows]:
        photo = Image.fromarray((255 * image.permute(1, 2, 0)).round().byte().numpy())
        found = {"picture": None, "the nuclei": mask[0]}
        for name, model in models.items():
            found[name.replace("deep supervision", "deep")] = model.run(image[None]).logits[0, 0] > 0
        shown = [photo if inside is None else overlay(photo, inside) for inside in found.values()]
        if not lines:
            shown = [label(tile, name, size=11, lines=2) for tile, name in zip(shown, found, strict=True)]
        lines.append(in_a_row(shown))
    return stacked(lines)


def text(result: dict[str, Any]) -> str:
    """The tables of the study, under their own heading."""
    tables = unetpp.text(result).partition("\n\n")[2]
    s = result["settings"]
    seeds = f"{len(s['seeds'])} seeds (mean ± sd)" if len(s["seeds"]) > 1 else "one seed"
    return (
        f"Nuclei of the 2018 Data Science Bowl, {s['size']} pixels, {s['steps']} steps of {s['batch']}, {seeds}. "
        f"Time of a batch relative to UNet++ L4. {_precisions(result)}\n\n{tables}{_of_both_classes(result)}"
    )


def _of_both_classes(result: dict[str, Any]) -> str:
    """The figure that segmentation is often reported by: higher, as most pixels are background and easy."""
    found = [
        f"{name} {study.shown(study.spread(run['test'][run['chosen']]['mean_iou'] for run in runs), 100)}"
        for name, runs in result["runs"].items()
    ]
    return f"\nMean IoU of nuclei and background, of the same networks and heads, %: {', '.join(found)}.\n"


def _precisions(result: dict[str, Any]) -> str:
    """What was trained in what, as a sentence."""
    seeds = result["settings"]["seeds"]
    half = [
        f"{name} (seed {seed})"
        for name, runs in result["runs"].items()
        for seed, run in zip(seeds, runs, strict=True)
        if run["precision"] == "bf16"
    ]
    if len(half) in (0, len(seeds) * len(result["runs"])):
        return f"Trained in {'bfloat16' if half else 'float32'}."
    return f"Trained in float32, {', '.join(half)} in bfloat16."


def main(argv: Sequence[str] | None = None) -> None:
    parser = study.arguments(__doc__, HOME)
    parser.add_argument("--published-widths", action="store_true", help="32 to 512, one seed")
    parser.add_argument("--short", action="store_true", help="one seed, narrow networks, few steps")
    parser.add_argument("--seeds", type=int, nargs="+", help="those to train with (default: all of the form)")
    parser.add_argument("--precision", choices=("no", "bf16"), default=fast_precision(), help="of training")
    args = parser.parse_args(argv)
    settings, name = FULL, "nuclei"
    if args.published_widths:
        settings, name = PUBLISHED, "nuclei-published"
    if args.short:
        settings, name = SHORT, "nuclei-short"
    if args.quick:
        settings = QUICK
    if unknown := set(args.seeds or ()) - set(settings.seeds):
        parser.error(f"--seeds: expected some of {', '.join(map(str, settings.seeds))}; got {sorted(unknown)}")
    out = OUT.with_name(f"{name}.json")
    if args.quick or args.out:
        out = (args.out or study.ROOT / "runs" / "real-nuclei-quick") / f"{name}.json"
    study.keep_existing(out, args.force)
    runs = study.ROOT / "runs" / f"real-{name}{'-quick' if args.quick else ''}"
    work = args.work or (runs / "cells" if args.quick else HOME / name)
    try:
        plan = Study(settings, work, runs / "models")
    except NotInstalledError as error:
        raise SystemExit(str(error)) from error
    plan.precision = args.precision
    result = unetpp.all_cells(plan, args.seeds)
    table = text(result)
    study.write_json(out, {**result, "machine": study.machine()})
    study.write_text(out.with_suffix(".md"), table)
    study.save_figure(unetpp.figure(result), out.with_suffix(".png"))
    if (sheet := pictures(plan, result)) is not None:
        with replacing(out.with_suffix(".jpg")) as (partial,):
            sheet.save(partial, "JPEG", quality=85)
    print(table)


if __name__ == "__main__":
    main()
