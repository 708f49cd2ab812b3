"""Class skipping: a step trains against the classes that look like the batch, and a few of the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from skipguide.config import JsonConfig, normalize_fields
from skipguide.errors import SkipError


@dataclass(frozen=True)
class ClassSkip(JsonConfig):
    """Which classes a training step compares with (arXiv 2412.11509, class-wise skipping).

    Classes are ranked by their similarity to the batch. The first ranks are kept, the later ones with a probability
    that decays exponentially. The labels of the batch itself are always kept.

    Attributes:
        ratio: share of the classes that is certainly kept, rounded up; a number above 1 is a count; 1 keeps all.
        max: at most this many are certainly kept (not applied when `ratio` is 1, as in the reference).
        decay: scale of the exponential, over ranks spread from 0 to 5.
        resample: `"run"` draws the kept ranks once (the reference), `"step"` draws them anew at every step.

    Raises:
        SkipError: for a ratio that is not positive, `max` below 1, or a decay that is not positive.

    Example:
        >>> [round(ClassSkip().expected(classes), 1) for classes in (100, 1000)]
        [53.5, 107.4]
    """

    ratio: float = 0.5
    max: int = 50
    decay: float = 0.3
    resample: Literal["run", "step"] = "run"

    def __post_init__(self) -> None:
        normalize_fields(self, {"max": 1}, {"ratio": None, "decay": None})
        if not self.ratio > 0:
            raise SkipError(f"expected a share in (0, 1] or a count above 1 as ratio; got {self.ratio}")
        if not self.decay > 0:
            raise SkipError(f"expected a positive decay; got {self.decay}")
        if self.resample not in ("run", "step"):
            raise SkipError(f'expected resample="run" or "step"; got {self.resample!r}')

    def certain(self, classes: int) -> int:
        """How many of `classes` ranks are kept for certain."""
        if self.ratio == 1:
            return classes
        wanted = math.ceil(self.ratio * classes) if self.ratio < 1 else int(self.ratio)
        return min(wanted, self.max, classes)

    def probabilities(self, classes: int) -> Tensor:
        """Probability of every rank to be kept, float64 [classes], the most similar class first."""
        certain = self.certain(classes)
        out = torch.ones(classes, dtype=torch.float64)
        rest = classes - certain
        if rest > 1:  # a single later rank is the first one of its kind, which is kept for certain
            tail = torch.exp(-torch.linspace(0, 5, rest, dtype=torch.float64) / self.decay)
            out[certain:] = (tail - tail[-1]) / (tail[0] - tail[-1])
        return out

    def expected(self, classes: int) -> float:
        """How many classes a step keeps on average."""
        return self.probabilities(classes).sum().item()

    def draw(self, classes: int, generator: torch.Generator | None = None) -> Tensor:
        """The ranks that are kept, bool [classes]."""
        return torch.bernoulli(self.probabilities(classes).float(), generator=generator).bool()


def rank(images: Tensor, labels: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """Order the classes by their similarity to the batch.

    Args:
        images: unit-length image features [N, E].
        labels: class of every image [N].
        prototypes: unit-length text features of the frozen model [C, E].

    Returns:
        The scores [C] (largest similarity over the batch; infinite for the batch's labels) and the class ids by
        falling score [C].
    """
    scores = (images @ prototypes.T).amax(0)
    scores[labels] = math.inf
    return scores, scores.argsort(descending=True, stable=True)


def choose(order: Tensor, kept_ranks: Tensor, labels: Tensor) -> Tensor:
    """The classes of this step, sorted ids [K]: those at kept ranks, and the batch's own labels in any case.

    Example:
        >>> choose(torch.tensor([3, 1, 0, 2]), torch.tensor([True, False, False, False]), torch.tensor([3, 1]))
        tensor([1, 3])
    """
    kept = torch.zeros_like(kept_ranks)
    kept[order] = kept_ranks
    kept[labels] = True
    return kept.nonzero()[:, 0]
