"""Which images a run sees, and in what order."""

from __future__ import annotations

import random
from collections.abc import Sequence

from skipguide.errors import SkipError


def by_class(labels: Sequence[int]) -> dict[int, list[int]]:
    """Positions of every label, labels in rising order."""
    groups: dict[int, list[int]] = {}
    for place, label in enumerate(labels):
        groups.setdefault(label, []).append(place)
    return dict(sorted(groups.items()))


def few_shot(labels: Sequence[int], shots: int, seed: int = 0) -> list[int]:
    """Positions of `shots` images of every class, the same for the same seed.

    Raises:
        SkipError: if a class has fewer, with its label and count.

    Example:
        >>> chosen = few_shot([0, 0, 0, 1, 1, 1], shots=2, seed=1)
        >>> len(chosen), sorted({[0, 0, 0, 1, 1, 1][i] for i in chosen})
        (4, [0, 1])
    """
    if shots < 1:
        raise SkipError(f"expected at least one shot; got {shots}")
    rng = random.Random(seed)
    chosen: list[int] = []
    for label, places in by_class(labels).items():
        if len(places) < shots:
            raise SkipError(
                f"expected at least {shots} images of every class; class {label} has {len(places)}: "
                "lower shots, or give more images"
            )
        chosen += sorted(rng.sample(places, shots))
    return chosen


def random_batches(count: int, size: int, rng: random.Random) -> list[list[int]]:
    """Shuffled positions in batches; what does not fill a batch is left out of this epoch.

    With fewer than `size` positions there is one smaller batch.
    """
    order = list(range(count))
    rng.shuffle(order)
    if count < size:
        return [order]
    return [order[i : i + size] for i in range(0, count - size + 1, size)]


def class_batches(labels: Sequence[int], size: int, rng: random.Random) -> list[list[int]]:
    """Batches whose images share one class, a class's batches after one another.

    A class with fewer than `size` images gives one smaller batch; what is left over otherwise is left out.
    """
    groups = list(by_class(labels).values())
    rng.shuffle(groups)
    batches: list[list[int]] = []
    for places in groups:
        order = list(places)
        rng.shuffle(order)
        full = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
        batches += full or [order]
    return batches
