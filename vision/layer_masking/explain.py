"""Explains a classifier's answer by the parts of the picture it rests on, and tests the explanation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from skipguide.errors import SkipError
from skipguide.hosts.accelerate import execution_device
from skipguide.shown import Row, Shown
from skipguide.vision.layer_masking.answers import logits_of, one_image, probabilities
from skipguide.vision.layer_masking.attribution import METHODS, lime, occlusion, rise, spread
from skipguide.vision.layer_masking.baselines import BASELINES, painted
from skipguide.vision.layer_masking.classifiers import Classifier
from skipguide.vision.layer_masking.layer_mask import FILLS, masked_forward
from skipguide.vision.layer_masking.mask_batches import many_masks
from skipguide.vision.layer_masking.numbered import number_segments
from skipguide.vision.layer_masking.segments import grid_segments, segment_masks, slic_segments

if TYPE_CHECKING:
    from PIL.Image import Image

COMPARED = ("neighbours", *BASELINES)


@dataclass(frozen=True, repr=False)
class Explanation(Shown):
    """An attribution and what it was tested with.

    Attributes:
        image: `[3, H, W]`, normalised.
        segments: `[H, W]` numbers.
        target: the class that is explained.
        weights: `[S]`, high = the class rests on it.
        shown: bool `[1, 1, H, W]`, the segments that rank first.
        numbers: plain data.
    """

    image: Tensor
    segments: Tensor
    target: int
    weights: Tensor
    shown: Tensor
    numbers: dict[str, Any] = field(default_factory=dict)

    def _heading(self) -> str:
        return f"Explanation of class {self.target}: {len(self.weights)} segments, the heaviest first"

    def _rows(self) -> list[Row]:
        best = self.weights.argsort(descending=True).tolist()
        return [("segment", "weight"), *((number, f"{float(self.weights[number]):+.3f}") for number in best)]

    @property
    def heat(self) -> Tensor:
        """The weights as a map `[H, W]`."""
        return spread(self.weights, self.segments)


def make_segments(image: Tensor, kind: str) -> Tensor:
    """The segments that `"grid:8"` or `"slic:40"` names, `[H, W]`.

    Raises:
        SkipError: for another name.
    """
    name, _, count = kind.partition(":")
    if name not in ("grid", "slic") or not count.isdecimal() or int(count) < 1:
        raise SkipError(f"expected segments grid:N (N x N patches) or slic:N (about N superpixels); got {kind!r}")
    if name == "grid":
        return grid_segments(image.shape[-2], image.shape[-1], int(count))
    return slic_segments(image, int(count))


@torch.no_grad()
def explain(
    classifier: Classifier,
    image: Tensor,
    *,
    method: str = "lime",
    segments: str = "grid:8",
    fill: str = "neighbours",
    target: int | None = None,
    samples: int = 512,
    top: float = 0.15,
    seed: int = 0,
    progress: bool = False,
) -> Explanation:
    """Attribute a class to segments, then leave out those that rank first, with every fill.

    Args:
        classifier: of `load_classifier`.
        image: `[3, H, W]`, of the classifier's `prepare`.
        method: lime, occlusion or rise.
        segments: `grid:N` or `slic:N`.
        fill: what stands in for what is hidden (`FILLS`).
        target: the class; the predicted one by default.
        samples: masks, for lime and rise.
        top: share of the segments that count as ranking first.
        seed: of the random masks.
        progress: show a bar.

    Raises:
        SkipError: for settings that are not known, or an image whose answer is not finite.
    """
    if method not in METHODS:
        raise SkipError(f"expected method {', '.join(METHODS)}; got {method!r}")
    if not 0 < top < 1:
        raise SkipError(f"expected top between 0 and 1; got {top}")
    model = classifier.model
    image = one_image(image).to(execution_device(model))
    parts = make_segments(image, segments).to(image.device)
    if int(parts.max()) == 0:
        raise SkipError(f"{segments} makes one segment of the picture, and there is nothing to compare: ask for more")
    forward = masked_forward(model, fill, scale=classifier.scale)
    plain = probabilities(logits_of(model(image[None])), model)[0]
    if not bool(torch.isfinite(plain).all()):
        raise SkipError("the model answers NaN to the whole image: check the image and the weights")
    target = int(plain.argmax()) if target is None else target
    if not 0 <= target < len(plain):
        raise SkipError(f"expected a class below {len(plain)}; got {target}")
    if method == "lime":
        weights = lime(forward, image, parts, target, samples=samples, seed=seed, progress=progress)
    elif method == "occlusion":
        weights = occlusion(forward, image, parts, target, progress=progress)
    else:
        heat = rise(forward, image, target, samples=samples, seed=seed, progress=progress).to(parts.device)
        count = int(parts.max()) + 1
        sums = torch.zeros(count, device=parts.device).index_add_(0, parts.flatten(), heat.flatten())
        weights = sums / torch.bincount(parts.flatten(), minlength=count)
    weights = weights.cpu()
    count = max(1, round(top * len(weights)))
    first = torch.zeros(1, len(weights), dtype=torch.bool)
    first[0, weights.argsort(descending=True)[:count]] = True
    order = weights.argsort(descending=True).tolist()
    tests = {}
    for name in (*COMPARED, fill) if fill not in COMPARED else COMPARED:
        other = masked_forward(model, name, scale=classifier.scale)
        found = probabilities(many_masks(other, image, torch.cat([first, ~first]), parts), model)
        only, without = (_answer(classifier, p, target) for p in found)
        tests[name] = {"only_top": only, "without_top": without}
    best = plain.topk(min(5, len(plain)))
    numbers = {
        "model": classifier.name,
        "size": list(image.shape[-2:]),
        "predictions": [
            {"class": int(c), "label": classifier.label(int(c)), "probability": round(float(p), 6)}
            for p, c in zip(best.values, best.indices, strict=True)
        ],
        "target": {
            "class": target,
            "label": classifier.label(target),
            "probability": round(float(plain[target]), 6),
        },
        "method": method, "segments": segments, "fill": fill, "samples": samples, "seed": seed,
        "top_segments": order[:count],
        "weights": [round(float(w), 6) for w in weights],
        "tests": tests,
        "masks": forward.stats.rows,
    }  # fmt: skip
    shown = segment_masks(first, parts)
    return Explanation(image, parts, target, weights, shown, numbers)


def _answer(classifier: Classifier, shares: Tensor, target: int) -> dict[str, Any]:
    best = int(shares.argmax())
    return {
        "probability": round(float(shares[target]), 6),
        "class": best,
        "label": classifier.label(best),
        "its_probability": round(float(shares[best]), 6),
    }


def heat_colours(heat: Tensor) -> Tensor:
    """A map `[H, W]` as colours `[3, H, W]` in 0..1: red speaks for the class, blue against it, white is 0."""
    value = heat / heat.abs().max().clamp_min(1e-12)
    red = torch.stack([torch.ones_like(value), 1 - value, 1 - value])
    blue = torch.stack([1 + value, 1 + value, torch.ones_like(value)])
    return torch.where(value >= 0, red, blue)


def draw(explanation: Explanation, classifier: Classifier, height: int = 224, *, note: str = "") -> Image:
    """The overlay, the segments with their numbers, and the masked variants side by side.

    Args:
        explanation: of `explain`.
        classifier: the same.
        height: of each picture, in pixels.
        note: a line under the title, such as what the model does not see of the picture.
    """
    import numpy as np
    from PIL import Image

    from skipguide.media.sheets import contact_sheet

    numbers, x, keep = explanation.numbers, explanation.image.cpu(), explanation.shown.cpu()
    seen = classifier.picture(x)

    def enlarged(picture: Image.Image) -> Image.Image:
        width = round(picture.width * height / picture.height)
        small = picture.height < height
        return picture.resize((width, height), Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC)

    grey = torch.from_numpy(np.array(seen.convert("L"), dtype=np.float32))[None] / 255
    overlay = 0.35 * grey + 0.65 * heat_colours(explanation.heat.cpu())
    heat = Image.fromarray((overlay.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())

    names = list(numbers["tests"])
    target = numbers["target"]
    top = numbers["top_segments"]
    parts = number_segments(enlarged(seen), explanation.segments, top)
    rows: list[list[Image.Image | None]] = [[enlarged(seen), enlarged(heat), parts, *([None] * (len(names) - 3))]]
    method = f"{numbers['method']}, {numbers['segments']}, {numbers['fill']}"
    first = f"segments, the reddest: {', '.join(map(str, top[:10]))}{', ...' if len(top) > 10 else ''}"
    captions = [[f"{target['label']} {target['probability']:.2f}", method, first, *([""] * (len(names) - 3))]]
    for key, mask in (("without_top", ~keep), ("only_top", keep)):
        rows.append([enlarged(without(classifier, x, mask, name)) for name in names])
        captions.append([_caption(name, numbers["tests"][name][key], target) for name in names])
    return contact_sheet(
        rows,
        title=f"{numbers['model']}: what speaks for {target['label']} (red) and against it (blue). Below: its answer "
        f"without the {len(top)} reddest of {len(numbers['weights'])} segments, and on them alone"
        f"{note and chr(10)}{note}",
        row_labels=["image", "reddest hidden", "reddest alone"],
        captions=captions,
    )


def without(classifier: Classifier, image: Tensor, keep: Tensor, fill: str) -> Image:
    """A picture in which a region is hidden, as it is shown: painted, or striped where it is absent and has no colour.

    Args:
        classifier: of `load_classifier`.
        image: `[3, H, W]`, of its `prepare`.
        keep: bool `[1, 1, H, W]`, True = visible.
        fill: of `FILLS`.
    """
    import numpy as np
    from PIL import Image

    if fill in BASELINES:
        return classifier.picture(painted(image[None], keep, fill, classifier.scale)[0])
    height, width = image.shape[-2:]
    stripes = (torch.arange(height)[:, None] + torch.arange(width)) // max(2, height // 32) % 2
    pixels = torch.from_numpy(np.array(classifier.picture(image)))
    ground = (205 + 25 * stripes).to(torch.uint8)[..., None].expand_as(pixels)
    return Image.fromarray(torch.where(keep[0, 0, ..., None], pixels, ground).contiguous().numpy())


def _caption(name: str, answer: dict[str, Any], target: dict[str, Any]) -> str:
    what = f"painted {name}" if name in BASELINES else "absent in every layer"
    instead = "" if answer["class"] == target["class"] else f" ({answer['label']} {answer['its_probability']:.2f})"
    return f"{what}: {target['label']} {answer['probability']:.2f}{instead}"


__all__ = ["COMPARED", "FILLS", "Explanation", "draw", "explain", "heat_colours", "make_segments"]
