"""What a classifier says of one picture under many masks, by every way of filling what is hidden."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipguide.vision.layer_masking import masked_forward

PAINTS = ("black", "grey", "mean", "blur")
FILLS = ("neighbours", *PAINTS, "inpaint", "mcal")
NAMES = {
    "neighbours": "layer masking",
    "black": "black",
    "grey": "grey",
    "mean": "mean colour",
    "blur": "blur (sees what is hidden)",
    "inpaint": "biharmonic inpainting",
    "mcal": "grey + MCal",
}
COARSE = 4  # inpainting is solved on a grid this much coarser, and enlarged: it is smooth, and the cost is cubic


class Remembered:
    """`f(keep, images) -> logits` of one image that runs each mask once, in whatever batch it comes.

    It has the form of a `MaskedForward`, and stands in for one.

    Args:
        inner: what answers.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.model: nn.Module = inner.model
        self.masker = inner.masker
        self.found: dict[bytes, Tensor] = {}

    def __call__(self, keep: Tensor, images: Tensor) -> Tensor:
        """Logits `[M, classes]` of the image under masks `[M, 1, H, W]`."""
        keys = [one.numpy().tobytes() for one in keep.bool().cpu()]
        new = {key: place for place, key in enumerate(keys) if key not in self.found}
        if new:
            answers = self.inner(keep[list(new.values())], images)
            self.found |= dict(zip(new, answers, strict=True))
        return torch.stack([self.found[key] for key in keys])


class Inpainted:
    """What is hidden is inpainted, by scikit-image's biharmonic equation: smoothly from what is around it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.masker = masked_forward(model, "grey").masker  # what `many_masks` asks how many rows fit

    def __call__(self, keep: Tensor, images: Tensor) -> Tensor:
        """Logits `[M, classes]` of the image under masks `[M, 1, H, W]`."""
        return self.model(inpainted(images, keep))


def inpainted(images: Tensor, keep: Tensor) -> Tensor:
    """Images `[M or 1, C, H, W]` with what masks `[M, 1, H, W]` hide inpainted.

    A cell of the coarse grid with any hidden pixel is unknown. Where nothing is known, it is the dataset's mean
    pixel.
    """
    from skimage.restoration import inpaint_biharmonic

    known = F.avg_pool2d(keep.float(), COARSE) == 1
    small = F.avg_pool2d(images, COARSE)
    filled = []
    for n, seen in enumerate(known[:, 0]):
        own = small[n if len(small) > 1 else 0]
        if not bool(seen.any()):
            filled.append(torch.zeros_like(own))
            continue
        own = own.where(seen, torch.zeros(()))  # nothing of what is hidden, not even its range
        found = torch.from_numpy(inpaint_biharmonic(own.permute(1, 2, 0).numpy(), ~seen.numpy(), channel_axis=-1))
        found = found.permute(2, 0, 1).to(own.dtype)
        filled.append(found.clamp(float(own[:, seen].min()), float(own[:, seen].max())))  # as bright as what is seen
    enlarged = F.interpolate(torch.stack(filled), scale_factor=COARSE, mode="bilinear")
    return torch.where(keep, images, enlarged)


class Calibrated:
    """Another fill's answers through a head that was fitted to undo what the paint does to them.

    Args:
        inner: the other fill.
        head: from logits to logits.
    """

    def __init__(self, inner: Any, head: Callable[[Tensor], Tensor]) -> None:
        self.inner, self.head = inner, head
        self.model, self.masker = inner.model, inner.masker

    def __call__(self, keep: Tensor, images: Tensor) -> Tensor:
        """Logits `[M, classes]` of the image under masks `[M, 1, H, W]`."""
        return self.head(self.inner(keep, images))


def answerers(model: nn.Module, scale: Any, head: Callable[[Tensor], Tensor]) -> dict[str, Remembered]:
    """Every fill, for one image: what it answered is kept until the next image has answerers of its own."""
    found = {fill: Remembered(masked_forward(model, fill, scale=scale)) for fill in ("neighbours", *PAINTS)}
    found["inpaint"] = Remembered(Inpainted(model))
    found["mcal"] = Remembered(Calibrated(found["grey"], head))
    return found
