"""Schedule: what holds at which moment of sampling, as data: a value for every moment, or a window of the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from skipguide.config import JsonConfig, layer_tuple, number, whole
from skipguide.errors import SkipError
from skipguide.shown import Row, Shown

Over = Literal["step", "sigma"]
Between = Literal["hold", "linear"]
SLACK = 1e-6  # of a fraction: step 3 of 10 is at 0.3 whatever the last bits are, and if 0.3 was a float32


@dataclass(frozen=True)
class Timetable(JsonConfig, Shown):
    """Values over the sampling steps, or over the noise level.

    Args:
        points: pairs (where, value). A value is a number (a scale) or a sequence of block numbers (layers).
        over: `"step"`: where is the fraction of the steps done, from 0, rising; a value holds from its point on, the
            first one also before it. `"sigma"`: where is the scheduler's noise level, which falls while sampling;
            the value in force is that of the closest higher sigma (the rule of LTX's own tables), above the highest
            point that of the highest.
        between: `"hold"` as above, or `"linear"` between neighbouring points (numbers only).

    Raises:
        SkipError: for points out of order or of no meaning.

    Example:
        >>> scale = Timetable([(0.0, 0.0), (0.2, 2.0), (0.6, 1.0)])
        >>> [scale.at(step / 10) for step in range(0, 10, 2)]
        [0.0, 2.0, 2.0, 1.0, 1.0]
        >>> Timetable([(1.0, 4), (0.9, 2)], over="sigma").at(0.0, sigma=0.95)
        4
    """

    points: Sequence[tuple[float, Any]]
    over: Over = "step"
    between: Between = "hold"

    def __post_init__(self) -> None:
        """Sort into the order of sampling and check."""
        if self.over not in get_args(Over) or self.between not in get_args(Between):
            raise SkipError(
                f"expected over {' or '.join(get_args(Over))} and between {' or '.join(get_args(Between))}; got "
                f"{self.over!r}, {self.between!r}"
            )
        try:
            pairs = [(number(where), value) for where, value in self.points]
        except (TypeError, ValueError):
            raise SkipError(f"expected points as pairs (where, value); got {self.points!r}") from None
        points = [(float(where), value) for where, value in pairs if where is not None]
        if not points or len(points) < len(pairs):
            raise SkipError(f"a timetable needs at least one point, at finite places; got {self.points!r}")
        if len({where for where, _ in points}) != len(points):
            raise SkipError(f"a timetable names a place twice: {self.points!r}")
        if self.over == "step" and not all(0 <= where <= 1 for where, _ in points):
            raise SkipError(f"over='step' counts fractions of the steps, 0 to 1; got {self.points!r}")
        points.sort(key=lambda point: point[0], reverse=self.over == "sigma")
        plain = [number(value) for _, value in points]
        if all(value is not None for value in plain):
            points = [(where, value) for (where, _), value in zip(points, plain, strict=True)]
        else:
            if self.between == "linear" or any(isinstance(value, (int, float, str)) for _, value in points):
                raise SkipError(
                    f"values must be all finite numbers, or all sequences of block numbers (which between='linear' "
                    f"cannot mix); got {self.points!r}"
                )
            points = [(where, layer_tuple(value)) for where, value in points]
        object.__setattr__(self, "points", tuple(points))

    def _rows(self) -> list[Row]:
        where = "fraction of the steps" if self.over == "step" else "sigma"
        return [(where, f"value ({self.between})"), *self.points]

    @property
    def values(self) -> tuple[Any, ...]:
        """The values in the order of sampling."""
        return tuple(value for _, value in self.points)

    def at(self, fraction: float, sigma: float | None = None) -> Any:
        """The value in force.

        Args:
            fraction: of the steps done before this one.
            sigma: the scheduler's noise level at this step; needed if `over` is `"sigma"`.
        """
        if self.over == "sigma":
            if sigma is None:
                raise SkipError("this timetable goes by sigma, and the noise level of the step is not known here")
            # falling axis: the same search with the sign turned
            here, places = -sigma, [-where for where, _ in self.points]
        else:
            here, places = fraction, [where for where, _ in self.points]
        after = next((i for i, place in enumerate(places) if place > here + 1e-9), len(places))
        if after == 0:
            return self.points[0][1]
        value = self.points[after - 1][1]
        if self.between == "hold" or after == len(places):
            return value
        share = (here - places[after - 1]) / (places[after] - places[after - 1])
        return value + min(max(share, 0.0), 1.0) * (self.points[after][1] - value)


@dataclass(frozen=True)
class Schedule(Shown):
    """A window of the sampling steps, as fractions of their number, and a stride inside it.

    Step `i` of `n` is active when `start <= i / n < stop`: the start is inclusive, the stop is not, and
    `start=0.0, stop=1.0` is every step.

    Example:
        >>> [i for i in range(10) if Schedule(0.2, 0.5).active(i, 10)]
        [2, 3, 4]
    """

    start: float = 0.0
    stop: float = 1.0
    every: int = 1

    def __post_init__(self) -> None:
        """Refuse windows that no step can fall into, and keep numbers of any library as Python's."""
        start, stop, every = number(self.start), number(self.stop), whole(self.every)
        if start is None or stop is None or not 0 <= start < stop <= 1:
            raise SkipError(
                f"start and stop are fractions of the steps with 0 <= start < stop <= 1; got start={self.start!r}, "
                f"stop={self.stop!r}"
            )
        if every is None or every < 1:
            raise SkipError(f"every must be a whole number of at least 1; got {self.every!r}")
        object.__setattr__(self, "start", float(start))
        object.__setattr__(self, "stop", float(stop))
        object.__setattr__(self, "every", every)

    def _rows(self) -> list[Row]:
        return [("start", "stop", "every"), (self.start, self.stop, self.every)]

    def contains(self, fraction: float) -> bool:
        """Whether the fraction of the steps done before a step lies in the window."""
        return fraction >= self.start - SLACK and (fraction < self.stop - SLACK or self.stop == 1.0)

    def active(self, step: int, steps: int) -> bool:
        """Whether step `step` (from 0) of `steps` lies in the window."""
        return self.contains(step / max(steps, 1))

    def fresh(self, step: int, steps: int) -> bool:
        """Whether `step` is one of the active steps that compute anew (every k-th from the window's start)."""
        first = math.ceil((self.start - SLACK) * steps)
        return self.active(step, steps) and (step - first) % self.every == 0
