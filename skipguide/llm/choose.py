"""Choose: which sublayers of a language model to leave out, from what is known of each. Pure functions on numbers.

A sublayer is the attention or the MLP of one layer. Sets are given as `Sublayers`; where a number stands for a
sublayer, 0 to L-1 are the attentions and L to 2L-1 the MLPs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from skipguide.config import whole
from skipguide.errors import SkipError
from skipguide.plan import SkipPlan


@dataclass(frozen=True)
class Sublayers:
    """A set of sublayers, layers in ascending order.

    Example:
        >>> Sublayers.numbered([6, 12, 3], num_layers=8)
        Sublayers(attn=(3, 6), mlp=(4,))
    """

    attn: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()

    @classmethod
    def numbered(cls, numbers: Iterable[int], num_layers: int) -> Sublayers:
        """From numbers of the 2L sublayers."""
        chosen = sorted(set(numbers))
        if chosen and not 0 <= chosen[0] <= chosen[-1] < 2 * num_layers:
            raise SkipError(f"expected sublayers from 0 to {2 * num_layers - 1}; got {chosen}")
        return cls(tuple(n for n in chosen if n < num_layers), tuple(n - num_layers for n in chosen if n >= num_layers))

    @classmethod
    def layers(cls, layers: Iterable[int]) -> Sublayers:
        """Whole layers: attention and MLP."""
        both = tuple(sorted(set(layers)))
        return cls(both, both)

    @property
    def count(self) -> int:
        """How many sublayers."""
        return len(self.attn) + len(self.mlp)

    def plan(self) -> SkipPlan:
        """The set as a plan for `skipguide.Skipper`."""
        return SkipPlan(self.attn, part="attn") | SkipPlan(self.mlp, part="mlp")


def sublayer_at(number: int, num_layers: int) -> tuple[int, str]:
    """Layer and part of a sublayer by its number.

    Example:
        >>> sublayer_at(3, num_layers=8), sublayer_at(12, num_layers=8)
        ((3, 'attn'), (4, 'mlp'))
    """
    return (number, "attn") if number < num_layers else (number - num_layers, "mlp")


def rank(attn_similarity: Sequence[float], mlp_similarity: Sequence[float]) -> list[int]:
    """All sublayers, most similar first; equals stay in order, attention before MLP.

    Source: AdaSkip (arXiv 2501.02336): attention and MLP compete in one list.

    Example:
        >>> rank([0.5, 0.9], [0.9, 0.7])
        [1, 2, 3, 0]
    """
    both = [*attn_similarity, *mlp_similarity]
    return sorted(range(len(both)), key=lambda n: -both[n])


def most_similar(
    attn_similarity: Sequence[float], mlp_similarity: Sequence[float], count: int, part: str = "both"
) -> Sublayers:
    """The `count` sublayers that change the stream least: of one list, or among attentions or MLPs alone.

    Example:
        >>> most_similar([0.5, 0.9], [0.8, 0.7], 2), most_similar([0.5, 0.9], [0.8, 0.7], 1, part="mlp")
        (Sublayers(attn=(1,), mlp=(0,)), Sublayers(attn=(), mlp=(0,)))
    """
    layers = len(attn_similarity)
    allowed = _allowed(part, layers)
    order = [n for n in rank(attn_similarity, mlp_similarity) if n in allowed]
    check_count(count, len(order))
    return Sublayers.numbered(order[:count], layers)


def least_per_millisecond(
    attn_similarity: Sequence[float],
    mlp_similarity: Sequence[float],
    attn_ms: Sequence[float],
    mlp_ms: Sequence[float],
    count: int | None = None,
    share: float | None = None,
    part: str = "both",
) -> Sublayers:
    """The sublayers with the smallest damage (1 - similarity) per millisecond saved.

    Give either `count`, how many sublayers, or `share`, how much of all sublayers' time to save: then sublayers are
    taken until it is reached, and those that the later ones made unnecessary are put back.

    Example:
        >>> least_per_millisecond([0.90, 0.95], [0.88, 0.5], [1, 1], [3, 3], share=0.25)  # MLPs cost more here
        Sublayers(attn=(), mlp=(0,))
    """
    layers = len(attn_similarity)
    similarity, ms = [*attn_similarity, *mlp_similarity], [*attn_ms, *mlp_ms]
    if len(ms) != len(similarity):
        raise SkipError(f"expected one time for each of {len(similarity)} sublayers; got {len(ms)}")
    if not all(math.isfinite(t) and t > 0 for t in ms):
        raise SkipError("expected sublayer times above 0 ms; measure them again")
    if (count is None) == (share is None):
        raise SkipError("expected either a count of sublayers or a share of their time")
    damage = [1 - s for s in similarity]
    allowed = _allowed(part, layers)
    order = sorted(allowed, key=lambda n: (damage[n] / ms[n], n))
    if count is not None:
        check_count(count, len(order))
        return Sublayers.numbered(order[:count], layers)
    if not 0 <= share < 1:  # type: ignore[operator]
        raise SkipError(f"expected a share of the time, at least 0 and below 1; got {share!r}")
    goal = share * sum(ms) - 1e-9 * sum(ms)  # type: ignore[operator]
    chosen: list[int] = []
    for number in order:
        if sum(ms[n] for n in chosen) >= goal:
            break
        chosen.append(number)
    saved = sum(ms[n] for n in chosen)
    if saved < goal:
        raise SkipError(f"all {len(order)} sublayers save {saved / sum(ms):.0%} of the time; {share:.0%} was asked for")
    for number in sorted(chosen, key=lambda n: -damage[n]):
        if saved - ms[number] >= goal:
            chosen.remove(number)
            saved -= ms[number]
    return Sublayers.numbered(chosen, layers)


def random_sublayers(num_layers: int, count: int, seed: int) -> Sublayers:
    """A baseline: `count` of the 2L sublayers at random.

    Example:
        >>> random_sublayers(12, 6, seed=1) == random_sublayers(12, 6, seed=1)
        True
    """
    check_count(count, 2 * num_layers)
    return Sublayers.numbered(random.Random(seed).sample(range(2 * num_layers), count), num_layers)


def late_layers(num_layers: int, count: int, first_kept_last: int = 0) -> Sublayers:
    """A baseline: the last `count` whole layers, as an early exit; the very last `first_kept_last` may stay.

    Example:
        >>> late_layers(12, 2), late_layers(12, 2, first_kept_last=1).attn
        (Sublayers(attn=(10, 11), mlp=(10, 11)), (9, 10))
    """
    check_count(count, num_layers - first_kept_last)
    stop = num_layers - first_kept_last
    return Sublayers.layers(range(stop - count, stop))


def least_influential(block_similarity: Sequence[float], count: int) -> Sublayers:
    """A baseline: the `count` whole layers of least block influence, 1 - cosine of a layer's input and output.

    Source: ShortGPT (arXiv 2403.03853).

    Example:
        >>> least_influential([0.5, 0.9, 0.8], 1)
        Sublayers(attn=(1,), mlp=(1,))
    """
    check_count(count, len(block_similarity))
    order = sorted(range(len(block_similarity)), key=lambda n: -block_similarity[n])
    return Sublayers.layers(order[:count])


def check_count(count: int, available: int) -> None:
    """Refuse a number of sublayers (or layers) that there are not."""
    if (found := whole(count)) is None or not 0 <= found <= available:
        raise SkipError(f"expected a whole number from 0 to {available}; got {count!r}")


def _allowed(part: str, num_layers: int) -> range:
    try:
        return {
            "both": range(2 * num_layers),
            "attn": range(num_layers),
            "mlp": range(num_layers, 2 * num_layers),
        }[part]
    except KeyError:
        raise SkipError(f'expected part "both", "attn" or "mlp"; got {part!r}') from None
