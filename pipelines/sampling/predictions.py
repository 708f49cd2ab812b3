"""The prediction in a denoiser's output, in whatever form it comes, and the check that a skip changed it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skipguide.errors import NoEffectError, SkipError
from skipguide.plan import SkipPlan


def check_effect(plain: Tensor, skipped: Tensor, plan: SkipPlan) -> None:
    """Refuse a skip that changed nothing, and predictions that are not numbers.

    Raises:
        NoEffectError: if both predictions are the same, to rounding.
        SkipError: if one of them is not finite.
    """
    if not torch.isfinite(plain).all():
        raise SkipError("the denoiser's plain prediction is not finite; guidance has nothing to work on")
    if not torch.isfinite(skipped).all():
        raise SkipError(f"the prediction without layers {list(plan.layers)} is not finite: skip others, or use float32")
    # another batch size moves the last bits, so equality is to rounding in full precision
    slack = 2e-6 if plain.dtype in (torch.float32, torch.float64) else 0.0
    if (plain - skipped).abs().max() <= slack * plain.abs().max():
        raise NoEffectError(
            f"skipping layers {list(plan.layers)} ({plan.part}) did not change the prediction: the "
            f"guidance would silently do nothing. Are these layers already bypassed, or their weights zero?"
        )


def first(out: Any) -> Tensor:
    """The prediction in a denoiser's output: a tensor, a tuple, or a model output; of a list of rows, a batch."""
    tensor: Any = out if isinstance(out, Tensor) else out[0]
    return torch.stack(tensor) if isinstance(tensor, list) else tensor


def widened(prediction: Tensor) -> Tensor:
    """In float32 at least: guidance multiplies small differences."""
    return prediction.float() if prediction.element_size() < 4 else prediction


def with_first(out: Any, tensor: Tensor) -> Any:
    """The same kind of output with another prediction."""
    if isinstance(out, Tensor):
        return tensor
    made: Any = list(tensor) if isinstance(out[0], list) else tensor
    if isinstance(out, tuple):
        return (made, *out[1:])
    return type(out)(**{**out, next(iter(out)): made})
