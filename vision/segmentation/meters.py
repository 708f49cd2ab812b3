"""Measures of segmentation, counted over a whole data set."""

from __future__ import annotations

import torch
from torch import Tensor

from skipguide.errors import SkipError


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
        _refuse_nan(logits)
        if target.dtype is not torch.bool and not bool(((target == 0) | (target == 1)).all()):
            raise SkipError(
                f"expected a target of 0 and 1; got {float(target.min()):g} to {float(target.max()):g}: compare it "
                "with what is inside first"
            )
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


def _refuse_nan(logits: Tensor) -> None:
    """NaN compares as outside and as class 0, and would be scored as such."""
    if bool(torch.isnan(logits).any()):
        raise SkipError("expected finite logits; got NaN: check the images and the weights")


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
        """Count a batch: predicted classes (or logits `[N, classes, H, W]`) and target `[N, H, W]`.

        Raises:
            SkipError: for other shapes, classes out of range, NaN, or a target that is not of whole numbers.
        """
        if predicted.is_floating_point():
            if predicted.ndim != target.ndim + 1 or predicted.shape[1] != self.classes:
                raise SkipError(
                    f"expected logits [N, {self.classes}, H, W] for a target [N, H, W]; got {tuple(predicted.shape)} "
                    f"and {tuple(target.shape)}"
                )
            _refuse_nan(predicted)
            predicted = predicted.argmax(1)
        if target.is_floating_point() and not bool((target == target.round()).all()):
            raise SkipError("expected a target of whole numbers, a class per pixel; got fractions or NaN")
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
