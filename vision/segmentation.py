"""Segmentation: losses, measures over a whole data set, and images larger than memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skipguide.errors import SkipError

if TYPE_CHECKING:
    from PIL.Image import Image


def bce_dice_loss(logits: Tensor, target: Tensor, bce_weight: float = 0.5, smooth: float = 1e-5) -> Tensor:
    """Binary cross-entropy and Dice: `bce_weight * BCE + 1 - Dice`, Dice per image over all its classes.

    Args:
        logits: `[N, classes, H, W]`.
        target: the same shape, 0 or 1.
        bce_weight: weight of the cross-entropy (arXiv 1807.10165, equation 2, has a half).
        smooth: keeps Dice defined where both masks are empty.

    Raises:
        SkipError: if the shapes differ.

    Example:
        >>> sure = torch.full((1, 1, 4, 4), 50.0)
        >>> round(bce_dice_loss(sure, torch.ones_like(sure)).item(), 6)
        0.0
    """
    if logits.shape != target.shape:
        raise SkipError(f"expected a target of shape {tuple(logits.shape)}; got {tuple(target.shape)}")
    # Sums over pixels are beyond what float16 holds and bfloat16 counts.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    target = target.to(logits.dtype)
    chance, truth = logits.sigmoid().flatten(1), target.flatten(1)
    dice = (2 * (chance * truth).sum(1) + smooth) / (chance.sum(1) + truth.sum(1) + smooth)
    return bce_weight * F.binary_cross_entropy_with_logits(logits, target) + (1 - dice).mean()


def deep_supervision_loss(
    heads: Tensor | Sequence[Tensor],
    target: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor] = bce_dice_loss,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """The mean of a loss over the heads.

    Args:
        heads: logits of each head, as `UNetPlusPlus` returns them; a single tensor counts as one head.
        target: what every head should give.
        loss: of one head's logits and the target.
        weights: one per head, for a weighted mean; equal by default.

    Raises:
        SkipError: without heads, or if the weights are not one non-negative number per head with a positive sum.
    """
    heads = [heads] if isinstance(heads, Tensor) else list(heads)
    weights = [1.0] * len(heads) if weights is None else list(weights)
    if not heads or len(weights) != len(heads) or min(weights) < 0 or sum(weights) <= 0:
        raise SkipError(f"expected one weight >= 0 for each of {len(heads)} heads, not all zero; got {weights}")
    total = sum(weights)
    parts = [w / total * loss(head, target) for w, head in zip(weights, heads, strict=True) if w]
    return torch.stack(parts).sum()


class MaskMeter:
    """IoU and Dice of independent masks, from counts over the whole set: batch sizes do not matter.

    Args:
        classes: number of masks per image.
        threshold: probability from which a pixel counts as inside.

    Example:
        >>> meter = MaskMeter(1)
        >>> meter.update(torch.tensor([[[[9.0, 9.0, -9.0]]]]), torch.tensor([[[[1, 0, 0]]]]))
        >>> meter.iou.item(), round(meter.dice.item(), 4)
        (0.5, 0.6667)
    """

    def __init__(self, classes: int, threshold: float = 0.5) -> None:
        if classes < 1 or not 0 < threshold < 1:
            raise SkipError(f"expected classes >= 1 and a threshold in (0, 1); got {classes} and {threshold}")
        self.cut = float(torch.logit(torch.tensor(threshold, dtype=torch.float64)))
        self.both = torch.zeros(classes, dtype=torch.long)
        self.total = torch.zeros(classes, dtype=torch.long)

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Count a batch: logits and target `[N, classes, H, W]`."""
        if logits.shape != target.shape or logits.ndim < 2 or logits.shape[1] != len(self.both):
            raise SkipError(
                f"expected logits and target [N, {len(self.both)}, H, W]; got {tuple(logits.shape)} and "
                f"{tuple(target.shape)}"
            )
        if bool(torch.isnan(logits).any()):
            raise SkipError("expected finite logits; got NaN")
        found, truth = logits.detach() > self.cut, target > 0.5
        axes = [0, *range(2, logits.ndim)]
        self.both += (found & truth).sum(axes).cpu()
        self.total += (found.sum(axes) + truth.sum(axes)).cpu()

    @property
    def iou(self) -> Tensor:
        """`[classes]` intersection over union; 1 for a class that neither occurs nor is found."""
        return _ratio(self.both, self.total - self.both)

    @property
    def dice(self) -> Tensor:
        """`[classes]` Dice coefficient; 1 for a class that neither occurs nor is found."""
        return _ratio(2 * self.both, self.total)

    @property
    def pooled_iou(self) -> float:
        """IoU of the pixels of all classes together."""
        return float(_ratio(self.both.sum(), (self.total - self.both).sum()))


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part.double() / whole.clamp(min=1), torch.ones((), dtype=torch.float64))


class ClassMeter:
    """Mean IoU of one class per pixel, both ways in use.

    `mean_iou` counts over the whole set, over the classes that occur or are predicted anywhere. `challenge_miou` is the
    form of the floor plan challenge: per batch over the classes that occur there, then the mean over batches. It
    depends on the batch size and forgives classes that are only predicted.

    Args:
        classes: number of classes.
        ignore: a label that is left out.

    Example:
        >>> meter = ClassMeter(3)
        >>> meter.update(torch.tensor([[0, 0, 2]]), torch.tensor([[0, 0, 0]]))
        >>> round(meter.mean_iou, 4), round(meter.challenge_miou, 4)
        (0.3333, 0.6667)
    """

    def __init__(self, classes: int, ignore: int = 255) -> None:
        self.classes, self.ignore = classes, ignore
        self.confusion = torch.zeros(classes, classes, dtype=torch.long)
        self.per_batch: list[float] = []

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Count a batch: predicted classes (or logits `[N, classes, H, W]`) and target `[N, H, W]`."""
        if predicted.is_floating_point():
            predicted = predicted.argmax(1)
        if predicted.shape != target.shape:
            raise SkipError(f"expected classes of shape {tuple(target.shape)}; got {tuple(predicted.shape)}")
        keep = target != self.ignore
        truth, found = target[keep].long().cpu(), predicted[keep].long().cpu()
        if len(truth) == 0:
            return
        if min(int(truth.min()), int(found.min())) < 0 or max(int(truth.max()), int(found.max())) >= self.classes:
            raise SkipError(
                f"expected classes 0..{self.classes - 1}; got {sorted(set(truth.tolist() + found.tolist()))}"
            )
        counts = torch.bincount(truth * self.classes + found, minlength=self.classes**2).view_as(self.confusion)
        self.confusion += counts
        occurs = counts.sum(1) > 0
        self.per_batch.append(float(_iou(counts)[occurs].mean()))

    @property
    def iou(self) -> Tensor:
        """`[classes]`, NaN for a class that neither occurs nor is predicted."""
        return _iou(self.confusion)

    @property
    def mean_iou(self) -> float:
        """Mean over the classes, counted over the whole set."""
        return float(self.iou.nanmean())

    @property
    def challenge_miou(self) -> float:
        """Mean over batches of the mean over the classes that occur in the batch."""
        return sum(self.per_batch) / len(self.per_batch) if self.per_batch else float("nan")

    @property
    def accuracy(self) -> float:
        """Share of the pixels with the right class."""
        return float(self.confusion.diagonal().sum() / self.confusion.sum())


def _iou(confusion: Tensor) -> Tensor:
    both = confusion.diagonal().double()
    return both / (confusion.sum(0) + confusion.sum(1) - confusion.diagonal())


@torch.no_grad()
def predict_tiled(
    model: Callable[[Tensor], Tensor], images: Tensor, tile: int = 512, overlap: int = 64, batch: int = 1
) -> Tensor:
    """Run a model over large images tile by tile and blend the overlaps.

    Args:
        model: maps `[n, C, h, w]` to `[n, classes, h, w]`, for example `lambda x: net(x, head=2)`.
        images: `[N, C, H, W]`; an image within one tile runs whole.
        tile: side of a tile in pixels.
        overlap: pixels that neighbours share; their weights fall linearly towards a tile's border.
        batch: tiles per call.

    Returns:
        `[N, classes, H, W]`.

    Raises:
        SkipError: unless `0 <= overlap <= tile / 2` and `batch >= 1`, or if the model changes the size.

    Example:
        >>> images = torch.rand(1, 1, 20, 30)
        >>> torch.allclose(predict_tiled(lambda x: 2 * x, images, tile=8, overlap=4), 2 * images)
        True
    """
    if tile < 1 or not 0 <= overlap <= tile // 2 or batch < 1:
        raise SkipError(f"expected 0 <= overlap <= tile / 2 and batch >= 1; got {overlap=}, {tile=}, {batch=}")
    if images.ndim != 4 or len(images) == 0:
        raise SkipError(f"expected images [N, C, H, W], at least one; got {tuple(images.shape)}")
    height, width = images.shape[-2:]
    tops, lefts = _starts(height, tile, overlap), _starts(width, tile, overlap)
    h, w = min(tile, height), min(tile, width)
    ramp_y, ramp_x = _ramp(h, overlap, images), _ramp(w, overlap, images)
    weight = ramp_y[:, None] * ramp_x
    if len(tops) == len(lefts) == 1:
        return _run_tiles(model, images)
    places = [(n, y, x) for n in range(len(images)) for y in tops for x in lefts]
    total: Tensor | None = None
    weights = weight.new_zeros(height, width)
    for y in tops:
        for x in lefts:
            weights[y : y + h, x : x + w] += weight
    for at in range(0, len(places), batch):
        some = places[at : at + batch]
        out = _run_tiles(model, torch.stack([images[n, :, y : y + h, x : x + w] for n, y, x in some]))
        if total is None:
            total = out.new_zeros(len(images), out.shape[1], height, width)
        for (n, y, x), one in zip(some, out, strict=True):
            total[n, :, y : y + h, x : x + w] += one * weight
    assert total is not None
    return (total / weights).to(total.dtype)


def _run_tiles(model: Callable[[Tensor], Tensor], tiles: Tensor) -> Tensor:
    out: Any = model(tiles)
    if not isinstance(out, Tensor) or out.ndim != 4 or out.shape[-2:] != tiles.shape[-2:]:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        height, width = tiles.shape[-2:]
        raise SkipError(f"expected the model to return one tensor [n, classes, {height}, {width}]; got {got}")
    return out


def _starts(side: int, tile: int, overlap: int) -> list[int]:
    if side <= tile:
        return [0]
    return [*range(0, side - tile, tile - overlap), side - tile]


def _ramp(length: int, overlap: int, like: Tensor) -> Tensor:
    dtype = like.dtype if like.is_floating_point() else torch.float32  # of bytes the model makes floats
    place = torch.arange(length, device=like.device, dtype=dtype)
    edge = torch.minimum(place, place.flip(0)) + 1
    return (edge / (overlap + 1)).clamp(max=1)


def inside_of(mask: Image, name: object = "the mask") -> Tensor:
    """Bool `[H, W]`, true where a picture of a mask is at least half white.

    Args:
        mask: any mode; black outside, white inside.
        name: what to call it in an error.

    Raises:
        SkipError: for a mask of small numbers (0 and 1, or a number per object), which would read as empty.
    """
    import numpy as np

    from skipguide.media.frames import as_rgb

    values = np.asarray(as_rgb(mask, name).convert("L"))
    if 0 < values.max() < 128:
        raise SkipError(
            f"{name} has values up to {values.max()} only; expected 0 outside and 255 inside: multiply a mask of 0 and "
            "1 by 255, or compare one of numbered objects with 0"
        )
    return torch.from_numpy(values >= 128)


def overlay(image: Image, mask: Tensor, colour: tuple[int, int, int] = (220, 38, 38), opacity: float = 0.45) -> Image:
    """A picture with a mask in colour and its outline in full.

    Args:
        image: any mode; not changed.
        mask: `[H, W]`, true inside, of the picture's size.
        colour: of the mask.
        opacity: of its inside, 0..1.
    """
    import numpy as np
    from PIL import Image as Pillow

    inside = mask.detach().cpu().bool()
    if tuple(inside.shape) != (image.height, image.width):
        raise SkipError(f"expected a mask of {image.height}x{image.width} pixels; got {tuple(inside.shape)}")
    shrunk = ~(F.max_pool2d((~inside)[None, None].float(), 3, stride=1, padding=1)[0, 0].bool())
    edge = (inside & ~shrunk).numpy()
    pixels = np.asarray(image.convert("RGB")).astype(np.float32)
    paint = np.asarray(colour, dtype=np.float32)
    pixels[inside.numpy()] = (1 - opacity) * pixels[inside.numpy()] + opacity * paint
    pixels[edge] = paint
    return Pillow.fromarray(pixels.round().astype(np.uint8))
