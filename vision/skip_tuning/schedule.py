"""Learning rates: a constant warm-up, then half a cosine, both per epoch."""

from __future__ import annotations

import math


def learning_rate(epoch: int, epochs: int, peak: float, *, warmup_epochs: int = 1, warmup: float = 1e-6) -> float:
    """The learning rate of one epoch.

    As in the reference, the cosine spans `epochs` epochs and starts after the warm-up, so with a warm-up its last
    value is above zero.

    Args:
        epoch: from 0.
        epochs: of the whole run.
        peak: the largest rate.
        warmup_epochs: how many epochs run at `warmup`.
        warmup: rate of the warm-up.

    Example:
        >>> [round(1e6 * learning_rate(e, 4, 2e-5), 2) for e in range(4)]
        [1.0, 20.0, 17.07, 10.0]
    """
    if epoch < warmup_epochs:
        return warmup
    return peak * (1 + math.cos(math.pi * (epoch - warmup_epochs) / epochs)) / 2
