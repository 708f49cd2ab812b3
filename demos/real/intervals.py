"""Means with a 95 % interval over what was sampled: photos, windows of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000


def interval(values: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """The mean and its 95 % bootstrap interval (percentiles of resampled means; the same draws for the same count).

    Example:
        >>> interval([0.0, 1.0, 1.0, 1.0])
        {'mean': 0.75, 'low': 0.25, 'high': 1.0, 'n': 4}
    """
    found = np.asarray(values, dtype=float)
    if not len(found):
        return {"mean": None, "low": None, "high": None, "n": 0}
    draws = np.random.default_rng(0).integers(len(found), size=(RESAMPLES, len(found)))
    low, high = np.quantile(found[draws].mean(1), (0.025, 0.975))
    return {
        "mean": round(float(found.mean()), digits),
        "low": round(float(low), digits),
        "high": round(float(high), digits),
        "n": len(found),
    }
