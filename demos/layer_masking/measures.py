"""What the study measures: accuracy, class entropy, unchanged predictions, leakage of the mask's shape, LIME."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from demos.layer_masking import data
from skipguide.vision import masked_forward
from skipguide.vision.layer_masking import FILLS, grid_segments, lime, many_masks, segment_masks, slic_segments
from skipguide.vision.layer_masking.attribution import spread

FRACTIONS = tuple(f / 10 for f in range(1, 11))
LIME_FILLS = ("neighbours", "black", "grey", "mean", "blur")
KEPT_SHARES = (0.05, 0.1, 0.2, 0.4)
CELLS = 8


@torch.inference_mode()
def predictions(model: nn.Module, images: Tensor, keep: Tensor | None, fill: str, batch: int = 100) -> Tensor:
    """`[N]` classes of bytes `[N, 3, H, W]` under masks `[N, 1, H, W]`."""
    forward = masked_forward(model, fill)
    parts = []
    for start in range(0, len(images), batch):
        x = data.normalized(images[start : start + batch])
        parts.append(model(x) if keep is None else forward(keep[start : start + batch], x))
    return torch.cat(parts).argmax(1)


def entropy(classes: Tensor) -> float:
    """Of the histogram of predictions, in nats; ln 10 if every class is predicted equally often."""
    share = torch.bincount(classes, minlength=len(data.CLASSES)).double() / len(classes)
    share = share[share > 0]
    return float(-(share * share.log()).sum())


def patches(scenes: data.Scenes, kind: str) -> list[Tensor]:
    """The segments of every scene."""
    if kind == "patches":
        return [grid_segments(data.SIZE, data.SIZE, CELLS)] * len(scenes)
    return [slic_segments(image, 40) for image in scenes.images]


def removal_masks(segments: list[Tensor], fraction: float, seed: int) -> Tensor:
    """Masks that hide that share of each scene's segments; with a larger fraction the same and more."""
    masks = []
    for number, own in enumerate(segments):
        g = torch.Generator().manual_seed(1000 * seed + number)
        order = torch.randperm(int(own.max()) + 1, generator=g)
        shown = torch.ones(1, len(order), dtype=torch.bool)
        shown[0, order[: round(fraction * len(order))]] = False
        masks.append(segment_masks(shown, own))
    return torch.cat(masks)


def removal(model: nn.Module, scenes: data.Scenes, kind: str, segments: list[Tensor], seed: int) -> list[dict]:
    """Accuracy, entropy and unchanged predictions against the removed fraction, for every fill."""
    before = predictions(model, scenes.images, None, "grey")
    rows = []
    for fraction in FRACTIONS:
        keep = removal_masks(segments, fraction, seed)
        for fill in FILLS:
            after = predictions(model, scenes.images, keep, fill)
            rows.append({
                "segments": kind, "fraction": fraction, "fill": fill,
                "accuracy": float((after == scenes.labels).float().mean()),
                "entropy": entropy(after),
                "unchanged": float((after == before).float().mean()),
            })  # fmt: skip
    return rows


def leakage(model: nn.Module, scenes: data.Scenes) -> list[dict]:
    """Does the shape of the hole say what was there?

    The shape itself is removed, to the pixel: what is still right is read off the hole. And the hole of another
    scene's shape is cut beside the own shape: how often is the hole's class predicted, and the own class kept?
    """
    other = torch.roll(torch.arange(len(scenes)), 1)
    hole = scenes.shapes[other]
    moved = torch.zeros_like(hole)
    fits = torch.zeros(len(scenes), dtype=torch.bool)
    for n in range(len(scenes)):  # the first of a few shifts that does not touch the own shape
        for dy, dx in ((0, 0), (32, 0), (0, 32), (32, 32), (16, 32), (32, 16)):
            there = hole[n].roll((dy, dx), (0, 1))
            wraps = bool((there[0] & there[-1]).any() | (there[:, 0] & there[:, -1]).any())
            if not wraps and not bool((there & scenes.shapes[n]).any()):
                moved[n], fits[n] = there, True
                break
    fits &= scenes.labels != scenes.labels[other]
    rows = []
    for fill in FILLS:
        gone = predictions(model, scenes.images, ~scenes.shapes[:, None], fill)
        beside = predictions(model, scenes.images[fits], ~moved[fits][:, None], fill)
        rows.append({
            "fill": fill,
            "right_without_the_shape": float((gone == scenes.labels).float().mean()),
            "says_the_hole": float((beside == scenes.labels[other][fits]).float().mean()),
            "keeps_its_class": float((beside == scenes.labels[fits]).float().mean()),
            "scenes": len(scenes), "scenes_beside": int(fits.sum()),
        })  # fmt: skip
    return rows


@torch.inference_mode()
def lime_rows(model: nn.Module, scenes: data.Scenes, samples: int, seed: int) -> list[dict]:
    """LIME with every fill, on the scenes that are classified rightly: does it point at the shape, and what happens
    to the prediction when the segments that it ranks first are removed?

    The removal is judged twice: with the fill that LIME used, and with the mean colour for all.
    """
    right = predictions(model, scenes.images, None, "grey") == scenes.labels
    numbers = right.nonzero()[:, 0].tolist()
    segments = grid_segments(data.SIZE, data.SIZE, CELLS)
    count = int(segments.max()) + 1
    rows = []
    judges = {fill: masked_forward(model, fill) for fill in LIME_FILLS}
    for fill in LIME_FILLS:
        pointed = mass = overlap = 0.0
        kept = {(judge, share): 0 for judge in ("own", "mean") for share in KEPT_SHARES}
        for n in numbers:
            image, label = data.normalized(scenes.images[n]), int(scenes.labels[n])
            weights = lime(judges[fill], image, segments, label, samples=samples, seed=seed)
            shape = scenes.shapes[n].float()
            best = int(weights.argmax())
            pointed += float((shape[segments == best]).amax())
            positive = spread(weights.clamp_min(0), segments)
            mass += float((positive * shape).sum() / positive.sum().clamp_min(1e-12))
            order = weights.argsort(descending=True)
            inside = torch.zeros(count).index_add_(0, segments.flatten(), shape.flatten())
            parts = int((inside > 16).sum())  # a quarter of a patch
            overlap += float((inside[order[:parts]] > 16).float().mean()) if parts else 1.0
            shown = torch.ones(len(KEPT_SHARES), count, dtype=torch.bool)
            for row, share in enumerate(KEPT_SHARES):
                shown[row, order[: round(share * count)]] = False
            for judge, forward in (("own", judges[fill]), ("mean", judges["mean"])):
                after = many_masks(forward, image, shown, segments).argmax(1)
                for share, still in zip(KEPT_SHARES, (after == label).tolist(), strict=True):
                    kept[judge, share] += still
        total = max(1, len(numbers))
        rows.append({
            "fill": fill, "scenes": len(numbers), "samples": samples,
            "points_at_the_shape": pointed / total,
            "positive_weight_on_the_shape": mass / total,
            "top_segments_on_the_shape": overlap / total,
            "accuracy_without_the_top": {
                judge: {str(share): kept[judge, share] / total for share in KEPT_SHARES} for judge in ("own", "mean")
            },
        })  # fmt: skip
    return rows
