"""What comes in and out of an attribution: one image, segments, and the model's answers as probabilities."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from skipguide.errors import SkipError


def one_image(image: Any) -> Tensor:
    """One image as `[C, H, W]`; a batch of one is that.

    Raises:
        SkipError: for another shape.
    """
    if isinstance(image, Tensor):
        if image.ndim == 4 and image.shape[0] == 1:
            image = image[0]
        if image.ndim == 3 and 0 not in image.shape:
            return image
    got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
    raise SkipError(f"expected one image [C, H, W] or [1, C, H, W]; got {got}")


def as_segments(segments: Any) -> Tensor:
    """Segments as a tensor `[H, W]`; scikit-image gives NumPy arrays.

    Raises:
        SkipError: for something else.
    """
    if not isinstance(segments, Tensor):
        if not hasattr(segments, "__array__"):
            raise SkipError(f"expected segments [H, W] of whole numbers; got {type(segments).__name__}")
        segments = torch.from_numpy(segments.__array__().copy())
    if segments.ndim != 2 or segments.numel() == 0:
        raise SkipError(f"expected segments [H, W] of whole numbers; got shape {tuple(segments.shape)}")
    if segments.is_floating_point() or segments.is_complex() or segments.dtype is torch.bool:
        raise SkipError(f"expected segments as whole numbers; got {segments.dtype}")
    return segments


def logits_of(answer: Any) -> Tensor:
    """The logits of a model's answer: the answer itself, or what Hugging Face's models call so.

    Raises:
        SkipError: for an answer without.
    """
    if isinstance(answer, Tensor):
        return answer
    found = answer.get("logits") if isinstance(answer, Mapping) else getattr(answer, "logits", None)
    if isinstance(found, Tensor):
        return found
    raise SkipError(
        f"expected a model that answers with logits, a tensor or an output with `logits`; got {type(answer).__name__}"
    )


def probabilities(answers: Tensor, model: nn.Module | None = None) -> Tensor:
    """Answers `[M, classes]` as probabilities, in float32.

    The softmax of the logits; of a network with one output the sigmoid, the probability that it says yes. Answers that
    are probabilities already, because the network ends in Softmax or Sigmoid, are taken as they are, with a warning.

    Args:
        answers: of the model.
        model: tells a last Sigmoid; None does not look for one.

    Raises:
        SkipError: for another shape.
    """
    if answers.ndim != 2 or 0 in answers.shape:
        raise SkipError(f"expected a classifier with answers [M, classes]; got {tuple(answers.shape)}")
    answers = answers.float()
    if answers.shape[1] == 1:
        last = (
            None if model is None else next((m for m in reversed(list(model.modules())) if not any(m.children())), None)
        )
        done = isinstance(last, nn.Sigmoid)
    else:
        done = bool((answers >= 0).all()) and bool(((answers.sum(1) - 1).abs() < 1e-3).all())
    if done:
        warnings.warn(
            "the model answers with probabilities (it ends in Softmax or Sigmoid): they are taken as they are",
            UserWarning,
            stacklevel=3,
        )
        return answers
    return answers.sigmoid() if answers.shape[1] == 1 else answers.softmax(1)
