"""What is refused before a model runs under masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from skipguide.config import is_one_of
from skipguide.errors import SkipError
from skipguide.vision.layer_masking.baselines import BASELINES
from skipguide.vision.layer_masking.tokens import tokens_of

LAYER_FILLS = ("neighbours", "zeros", "partial")
FILLS = (*LAYER_FILLS, *BASELINES)


def check_keep(keep: Any, soft: bool = False) -> Tensor:
    """A mask as bool `[R, 1, H, W]`; with `soft`, other types are taken if they hold only 0 and 1.

    Raises:
        SkipError: for anything else.
    """
    what = "expected keep of bool [N or 1, H, W] or [N or 1, 1, H, W], True = visible"
    if not isinstance(keep, Tensor):
        raise SkipError(f"{what}; got {type(keep).__name__}: pass a tensor")
    if keep.ndim == 3:
        keep = keep[:, None]
    if keep.ndim != 4 or keep.shape[1] != 1 or 0 in keep.shape:
        raise SkipError(f"{what}; got shape {tuple(keep.shape)}")
    if keep.dtype != torch.bool:
        hard = bool(((keep == 0) | (keep == 1)).all())
        if not hard:
            low, high = float(keep.min()), float(keep.max())
            kind = "a soft mask" if 0 <= low <= high <= 1 else "numbers that are no mask of 0 and 1"
            raise SkipError(
                f"{what}; got {kind} ({keep.dtype}, from {low:g} to {high:g}): threshold it "
                f"(keep > {high / 2 if high > 1 else 0.5:g})"
            )
        if not soft:
            raise SkipError(f"{what}; got {keep.dtype}: pass keep.bool()")
        keep = keep.bool()
    return keep.detach()


def check_fill(fill: str) -> None:
    """Refuse an unknown fill."""
    if not is_one_of(fill, FILLS):
        raise SkipError(f"expected fill to be one of {', '.join(FILLS)}; got {fill!r}")


def check_model(model: nn.Module, keep: Tensor | None, fill: str) -> None:
    """Refuse a model that cannot be masked."""
    if not isinstance(model, nn.Module):
        raise SkipError(f"expected a torch module; got {type(model).__name__}")
    if model.training and any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules()):
        raise SkipError(
            "the model is in training mode and has batch norm, whose statistics the mask would enter: call model.eval()"
        )
    if fill in LAYER_FILLS and tokens_of(model) is None and not any(_convolves(m) for m in model.modules()):
        raise SkipError(
            f"{type(model).__name__} has no 2D convolution: layer masking is for convolutional networks and the vision "
            f"transformers of timm and torchvision"
        )
    parameter = next(model.parameters(), None)
    if keep is not None and parameter is not None and keep.device != parameter.device:
        raise SkipError(f"the mask is on {keep.device} and the model on {parameter.device}: move the mask")


def _convolves(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Conv2d) or (isinstance(weight, Tensor) and weight.ndim == 4)


def expanded(keep: Tensor, images: Any) -> tuple[Tensor, Tensor]:
    """Masks and images with the same number of rows, or one mask for all.

    Raises:
        SkipError: if they do not belong together.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise SkipError(f"expected images [N, C, H, W] of floats; got {got}")
    if keep.shape[-2:] != images.shape[-2:]:
        raise SkipError(f"expected a mask of the images' size {tuple(images.shape[-2:])}; got {tuple(keep.shape[-2:])}")
    if keep.device != images.device:
        raise SkipError(f"the mask is on {keep.device} and the images on {images.device}: move the mask")
    if images.shape[0] == 1 and keep.shape[0] > 1:
        images = images.expand(keep.shape[0], -1, -1, -1)
    if keep.shape[0] not in (1, images.shape[0]):
        raise SkipError(f"expected one mask or one for each of {images.shape[0]} images; got {keep.shape[0]}")
    return keep, images
