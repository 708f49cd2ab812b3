"""Unified Layer Skipping: one fixed set of whole layers per target speed-up, the same for every token and every input.

Source: Unified Layer Skipping (arXiv 2404.06954); the layers that stay depend on nothing but their number and the
speed-up. The method is meant for models *fine-tuned* with the layers left out (`demos/unified_finetune/`): on a
model that was not, it is a plain baseline and costs quality.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import nn

from skipguide.config import JsonConfig, as_number, as_whole, normalize_fields
from skipguide.errors import SkipError
from skipguide.llm.find import sublayer_map
from skipguide.llm.plan import SublayerPlan

if TYPE_CHECKING:
    from skipguide.llm.applied import AppliedSublayers

Mode = Literal["balanced", "reference"]


def unified_layers(num_layers: int, speedup: float, mode: str = "balanced") -> list[int]:
    """The layers that run, in order.

    `"balanced"` keeps `max(2, round(num_layers / speedup))` layers, spread evenly from the first to the last.
    `"reference"` is the published code's rule: the first layer, the last, and those at whole multiples of an interval
    between. Below a speed-up of 2 that rule is not balanced at all: it drops one block in front of the last layer.

    Args:
        num_layers: how many layers the model has.
        speedup: target of decoding, at least 1. What comes out is `num_layers / len(result)`, which can differ from it.
        mode: `"balanced"` or `"reference"`.

    Raises:
        SkipError: for a wrong number of layers, speed-up or mode; for the reference rule's division by zero, where
            exactly one layer would be left.

    Source: section 3 of the paper for the even spread; the training script of its code for the reference rule.

    Example:
        >>> unified_layers(12, 2)
        [0, 2, 4, 7, 9, 11]
        >>> unified_layers(12, 1.5), unified_layers(12, 1.5, mode="reference")
        ([0, 2, 3, 5, 6, 8, 9, 11], [0, 1, 2, 3, 4, 5, 6, 11])
    """
    num_layers, speedup = as_whole("num_layers", num_layers), as_number("speedup", speedup, 1)
    if mode == "balanced":
        count = min(num_layers, max(2, round(num_layers / speedup)))
        spread = np.round(np.linspace(0, num_layers - 1, count)).astype(int)
        return sorted({int(layer) for layer in spread})
    if mode == "reference":
        return _reference_rule(num_layers, speedup)
    raise SkipError(f'expected mode "balanced" or "reference"; got {mode!r}')


def _reference_rule(num_layers: int, speedup: float) -> list[int]:
    target = int(num_layers / speedup)
    if target == 1:
        raise SkipError(
            f"the reference rule divides by zero where one layer of {num_layers} is to stay (speed-up {speedup:g}): "
            f'ask for a speed-up of at most {num_layers / 2:g}, or take mode="balanced"'
        )
    kept = [0, num_layers - 1]
    interval = int(num_layers / (target - len(kept) + 1))
    for layer in range(1, num_layers - 1):
        if layer % interval == 0 and len(kept) < target:
            kept.append(layer)
    return sorted(set(kept))


@dataclass(frozen=True, repr=False)
class UnifiedSkip(JsonConfig):
    """Leave whole layers out of a causal language model, evenly, for a target speed-up.

    Args:
        speedup: target of the phase that skips, at least 1; what is reached follows from whole layers.
        mode: `"balanced"` or `"reference"`, see `unified_layers`.
        phase: `"decode"` runs all layers over the prompt and skips in token-by-token decoding, as the paper does;
            `"both"` skips in the prompt too, which also saves the key-value cache of the skipped layers.

    Raises:
        SkipError: for a speed-up below 1 or an unknown mode or phase.

    Example:
        >>> skip = UnifiedSkip(speedup=2.0)
        >>> skip.layers(12), skip.realised_speedup(12)
        ([0, 2, 4, 7, 9, 11], 2.0)
    """

    speedup: float = 2.0
    mode: str = "balanced"
    phase: str = "decode"

    def __post_init__(self) -> None:
        """Check every setting, and keep a number of any library as Python's."""
        normalize_fields(self, numbers={"speedup": 1})
        if self.mode not in ("balanced", "reference"):
            raise SkipError(f'expected mode "balanced" or "reference"; got {self.mode!r}')
        if self.phase not in ("decode", "both"):
            raise SkipError(f'expected phase "decode" or "both"; got {self.phase!r}')

    def layers(self, num_layers: int) -> list[int]:
        """The layers of a model of `num_layers` that run."""
        return unified_layers(num_layers, self.speedup, self.mode)

    def realised_speedup(self, num_layers: int) -> float:
        """All layers over those that run: the limit for the layers' time, embedding and head apart."""
        return int(num_layers) / len(self.layers(num_layers))

    def plan(self, num_layers: int) -> SublayerPlan:
        """The plan that leaves the other layers out.

        Raises:
            SkipError: if every layer would run: the plan would do nothing.
        """
        left_out = tuple(sorted({*range(num_layers)} - {*self.layers(num_layers)}))
        if not left_out and num_layers < 3:
            raise SkipError(f"the first and the last layer always run: of {num_layers} none can be left out")
        if not left_out:
            raise SkipError(
                f"a speed-up of {self.speedup:g} leaves none of {num_layers} layers out: ask for at least "
                f"{num_layers / max(1, num_layers - 1):.2f}"
            )
        return SublayerPlan(left_out, left_out, phase="both" if self.phase == "both" else "decode")

    def apply(self, model: nn.Module, *, everywhere: bool = False) -> AppliedSublayers:
        """Leave the layers out of `model.generate(...)` and plain forwards until `remove()` or the end of the `with`.

        Args:
            model: a causal language model of a known family.
            everywhere: leave them out in all threads, as for `SublayerPlan.apply`.

        Raises:
            SkipError: for a model that is too shallow, unknown, or whose later layers read a left-out layer's keys.
        """
        return self.plan(sublayer_map(model).num_layers).apply(model, everywhere=everywhere)
