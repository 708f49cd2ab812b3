"""Intervals: against arithmetic on paper and Student's table; what they say of a difference."""

import math

import pytest

from skipguide import SkipError
from skipguide.bench.intervals import Interval, paired, t95

# two-sided 95 % points as they are printed in books
TABLE = {1: 12.706, 2: 4.303, 5: 2.571, 10: 2.228, 11: 2.201, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980}


@pytest.mark.parametrize(("degrees", "point"), TABLE.items())
def test_points_of_students_t(degrees, point):
    assert t95(degrees) == pytest.approx(point, abs=6e-4)


def test_paired_differences_by_hand():
    # differences 1, 3, 5 of the seeds that both have: mean 3, deviation 2, half 4.3027 * 2 / sqrt(3)
    found = paired({0: 2.0, 1: 5.0, 2: 8.0, 9: 100.0}, {0: 1.0, 1: 2.0, 2: 3.0, 7: -100.0})
    assert (found.mean, found.count) == (3.0, 3)
    assert found.half == pytest.approx(4.3027 * 2 / math.sqrt(3), rel=1e-4)


def test_what_all_seeds_share_cancels():
    """Seeds differ by 100, the settings by one in every seed: the interval is of the settings."""
    reference = {seed: 100.0 * seed for seed in range(4)}
    found = paired({seed: value + 1 for seed, value in reference.items()}, reference)
    assert (found.mean, found.half) == (1.0, 0.0)
    assert Interval.of(list(reference.values())).half > 100


def test_nothing_in_common_and_one_pair():
    assert paired({0: 1.0}, {1: 1.0}) is None
    one = paired({0: 3.0}, {0: 1.0})
    assert (one.mean, one.half, one.verdict("higher")) == (2.0, None, "")
    with pytest.raises(SkipError, match="at least one value"):
        Interval.of([])
    with pytest.raises(SkipError, match="degree of freedom"):
        t95(0)


@pytest.mark.parametrize(
    ("mean", "better", "verdict"),
    [
        *((2.0, "higher", "better"), (-2.0, "higher", "worse"), (2.0, "lower", "worse"), (-2.0, "lower", "better")),
        *((0.5, "higher", "tie"), (-0.5, "lower", "tie"), (9.0, None, "")),
    ],
)
def test_verdicts(mean, better, verdict):
    assert Interval(mean, 1.0, 3).verdict(better) == verdict
