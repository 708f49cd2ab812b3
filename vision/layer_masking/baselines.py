"""Baselines: hidden pixels are painted over, and the network sees the paint as part of the image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipguide.errors import SkipError

BASELINES = ("black", "grey", "mean", "blur", "noise")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PixelScale = tuple[tuple[float, ...], tuple[float, ...]]


def pixel_scale(model: nn.Module) -> PixelScale:
    """Mean and standard deviation of the model's preprocessing: as timm states it, else ImageNet's."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    try:
        return tuple(config["mean"]), tuple(config["std"])
    except (KeyError, TypeError):
        return IMAGENET


def painted(images: Tensor, keep: Tensor, fill: str, scale: PixelScale = IMAGENET) -> Tensor:
    """The images with paint where hidden.

    Args:
        images: `[N, C, H, W]`, normalised.
        keep: bool `[N or 1, 1, H, W]`.
        fill: "black"; "grey", the dataset's mean pixel (0 after normalisation); "mean", of the visible pixels of
            each image; "blur", the image blurred over a third of its size (it sees hidden pixels: not a removal);
            "noise", uniform over the colours, the same for equal sizes.
        scale: of the preprocessing.

    Raises:
        SkipError: for another fill.
    """
    if fill == "grey":
        paint = torch.zeros((), dtype=images.dtype, device=images.device)
    elif fill in ("black", "noise"):
        if len(scale[0]) != images.shape[1]:
            raise SkipError(
                f"{fill!r} needs the mean and std of {images.shape[1]} channels; got {len(scale[0])}: pass "
                "masked_forward(..., scale=(mean, std))"
            )
        mean, std = (images.new_tensor(v).view(1, -1, 1, 1) for v in scale)
        colour = images.new_zeros(())
        if fill == "noise":
            g = torch.Generator().manual_seed(0)
            colour = torch.rand(1, *images.shape[1:], generator=g).to(images)
        paint = (colour - mean) / std
    elif fill == "mean":
        visible = torch.where(keep, images, 0.0)
        paint = visible.sum((2, 3), keepdim=True) / keep.sum((2, 3), keepdim=True).clamp_min(1)
    elif fill == "blur":
        paint = blurred(images)
    else:
        raise SkipError(f"expected a baseline of {', '.join(BASELINES)}; got {fill!r}")
    return torch.where(keep, images, paint.to(images.dtype))


def blurred(images: Tensor) -> Tensor:
    """Gaussian blur; the window is a third of the image wide, sigma a tenth."""
    size = min(images.shape[-2:])
    radius, sigma = max(1, size // 6), size / 10
    line = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (line / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(images.dtype)
    channels = images.shape[1]
    x = F.pad(images, (radius,) * 4, mode="reflect")
    x = F.conv2d(x, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
    return F.conv2d(x, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
