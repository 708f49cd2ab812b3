"""Connected regions of an array, by numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def regions(values: NDArray[Any]) -> NDArray[np.int64]:
    """`[H, W]`: one number for each region of equal values (neighbours share a side).

    Every pixel starts with its own number; runs along rows and columns take turns in adopting the smallest.

    >>> regions(np.array([[1, 1, 0], [0, 1, 0]])).tolist()
    [[0, 0, 2], [3, 0, 2]]
    """
    labels = np.arange(values.size, dtype=np.int64).reshape(values.shape)
    if values.size == 0:
        return labels
    while True:
        before = labels
        labels = _adopt(values, labels)
        labels = np.ascontiguousarray(_adopt(values.T, labels.T).T)
        if np.array_equal(before, labels):
            return labels


def _adopt(values: NDArray[Any], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    begins = np.ones(values.shape, dtype=bool)
    begins[:, 1:] = values[:, 1:] != values[:, :-1]
    flat = begins.ravel()
    smallest = np.minimum.reduceat(labels.ravel(), np.flatnonzero(flat))
    return smallest[np.cumsum(flat) - 1].reshape(values.shape)


def grow(mask: Mask, by: int = 1) -> Mask:
    """The mask with everything within `by` pixels, row and column wise (a square)."""
    for axis in (0, 1):
        wider = mask.copy()
        for shift in range(1, by + 1):
            ahead = [slice(None), slice(None)]
            behind = [slice(None), slice(None)]
            ahead[axis], behind[axis] = slice(shift, None), slice(None, -shift)
            wider[tuple(ahead)] |= mask[tuple(behind)]
            wider[tuple(behind)] |= mask[tuple(ahead)]
        mask = wider
    return mask


def outside(walls: Mask, gap: int = 0) -> Mask:
    """What a flood fill from around the image reaches.

    Args:
        walls: `[H, W]`, what stops it.
        gap: openings up to twice this many pixels wide count as closed.
    """
    closed = np.pad(grow(walls, gap) if gap else walls, 1)
    labels = regions(closed)
    reached = ((labels == labels[0, 0]) & ~closed)[1:-1, 1:-1]
    return grow(reached, gap) & ~walls if gap else reached


def innermost(mask: Mask) -> tuple[int, int]:
    """Row and column of a pixel deep inside a mask: where to write its name."""
    while True:
        smaller = ~grow(~np.pad(mask, 1))[1:-1, 1:-1]
        if not smaller.any():
            break
        mask = smaller
    rows, columns = np.nonzero(mask)
    nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
    return int(rows[nearest]), int(columns[nearest])
