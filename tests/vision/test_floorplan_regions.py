"""Regions of a plan equal a plain flood fill; the outside stops at walls, and gaps in them."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from skipguide.vision.floorplan.regions import grow, innermost, outside, regions


def slow_regions(values):
    height, width = values.shape
    labels = -np.ones(values.shape, dtype=int)
    for start in range(values.size):
        todo = [divmod(start, width)]
        while todo:
            y, x = todo.pop()
            if labels[y, x] < 0 and values[y, x] == values.flat[start]:
                labels[y, x] = start
                near = ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
                todo += [(a, b) for a, b in near if 0 <= a < height and 0 <= b < width]
    return labels


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))
def test_regions_equal_a_plain_flood_fill(height, width, seed):
    values = np.random.default_rng(seed).integers(0, 3, (height, width))
    assert np.array_equal(regions(values), slow_regions(values))


def test_outside_and_gaps():
    walls = np.zeros((12, 12), dtype=bool)
    walls[2:10, 2] = walls[2:10, 9] = walls[2, 2:10] = walls[9, 2:10] = True
    closed = outside(walls)
    assert closed[0, 0]
    assert not closed[5, 5]
    assert closed.sum() == 144 - 64
    walls[2, 5:7] = False  # a door of two pixels
    assert outside(walls)[5, 5]
    kept = outside(walls, gap=1)
    assert kept[0, 0]
    assert not kept[5, 5]
    assert not (kept & walls).any()
    touching = np.ones((4, 4), dtype=bool)  # walls on the border leave no outside
    touching[1:3, 1:3] = False
    assert not outside(touching).any()


def test_innermost_is_deep_inside():
    mask = np.zeros((20, 20), dtype=bool)
    mask[2:9, 3:18] = True
    mask[9:19, 3:5] = True
    row, column = innermost(mask)
    assert not (~mask & grow(np.pad(np.ones((1, 1), bool), ((row, 19 - row), (column, 19 - column))), 3)).any()
    assert innermost(np.eye(3, dtype=bool)) == (1, 1)
