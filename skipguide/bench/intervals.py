"""Intervals: differences of pairs with the 95 % interval of their mean. Pure functions on numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from skipguide.errors import SkipError

Better = Literal["higher", "lower"]
# two-sided 95 % points of Student's t, by degrees of freedom; above them the expansion below is exact to 1e-4
_T95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
_NORMAL = 1.959964


def t95(degrees: int) -> float:
    """The two-sided 95 % point of Student's t.

    Args:
        degrees: of freedom, at least 1.

    Example:
        >>> round(t95(2), 3), round(t95(30), 3)
        (4.303, 2.042)
    """
    if degrees < 1:
        raise SkipError(f"expected at least one degree of freedom; got {degrees}")
    if degrees <= len(_T95):
        return _T95[degrees - 1]
    z, n = _NORMAL, float(degrees)
    first = (z**3 + z) / (4 * n)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    return z + first + second + third


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    Attributes:
        mean: of the values.
        half: half of the width of the interval; None for one value, which says nothing about its spread.
        count: how many values.
    """

    mean: float
    half: float | None
    count: int

    @classmethod
    def of(cls, values: list[float]) -> Interval:
        """From values that are independent of each other (Student's t).

        Raises:
            SkipError: without a value.

        Example:
            >>> found = Interval.of([1.0, 2.0, 3.0])
            >>> found.mean, round(found.half, 3)
            (2.0, 2.484)
        """
        if not values:
            raise SkipError("expected at least one value for a mean; got none")
        mean = statistics.fmean(values)
        if len(values) == 1:
            return cls(mean, None, 1)
        return cls(mean, t95(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values)), len(values))

    def verdict(self, better: Better | None) -> str:
        """What a difference with this interval says: `better`, `worse`, `tie`, or nothing where it cannot say.

        Args:
            better: whether a higher or a lower value is better; None is neither.
        """
        if better is None or self.half is None:
            return ""
        gain = self.mean if better == "higher" else -self.mean
        return "better" if gain > self.half else "worse" if -gain > self.half else "tie"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"mean": self.mean, "half": self.half, "count": self.count}


def paired(values: Mapping[Any, float], reference: Mapping[Any, float]) -> Interval | None:
    """The mean of the differences over what both have a value for (seeds, prompts, pictures).

    Args:
        values: by the key that makes pairs.
        reference: the same of what it is compared with.

    Returns:
        None where they have no key in common.

    Example:
        >>> paired({0: 3.0, 1: 5.0}, {0: 2.0, 1: 2.0, 2: 9.0}).mean
        2.0
    """
    keys = [key for key in values if key in reference]
    return Interval.of([values[key] - reference[key] for key in keys]) if keys else None
