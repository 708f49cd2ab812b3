"""Drafter: which sublayers a drafter leaves out, from how little each changes the stream and what each costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from skipguide.errors import SkipError


@dataclass(frozen=True)
class SublayerSets:
    """The sublayers that a drafter leaves out.

    Attributes:
        attn: layers whose attention is left out.
        mlp: layers whose MLP is left out.
        saved: share of all sublayers' time that this saves.
    """

    attn: tuple[int, ...]
    mlp: tuple[int, ...]
    saved: float


def choose_drafter(
    attn_similarity: Sequence[float],
    mlp_similarity: Sequence[float],
    attn_ms: Sequence[float],
    mlp_ms: Sequence[float],
    ratio: float,
) -> SublayerSets:
    """Leave out what changes least per millisecond saved, until `ratio` of the sublayers' time is saved.

    The damage of a sublayer is 1 - cosine of the stream before and after it. Sublayers are taken by damage per
    millisecond, smallest first, and one that would overshoot by more than it brings nearer is passed over. One
    attention always stays: the lengths of the cache are read from it.

    Args:
        attn_similarity: mean cosine per layer over the attention's residual branch.
        mlp_similarity: the same over the MLP's.
        attn_ms: milliseconds of every attention at decoding.
        mlp_ms: milliseconds of every MLP at decoding.
        ratio: share of the sublayers' time to save, above 0 and below 1.

    Raises:
        SkipError: for lists of different lengths, a similarity that is not finite, times that are not positive, or a
            ratio outside (0, 1).

    Example:
        >>> found = choose_drafter([0.9, 0.99], [0.5, 0.98], [1.0, 1.0], [2.0, 2.0], ratio=0.5)
        >>> found.attn, found.mlp, found.saved
        ((1,), (1,), 0.5)
    """
    layers = len(attn_similarity)
    if layers < 1 or not len(mlp_similarity) == len(attn_ms) == len(mlp_ms) == layers:
        raise SkipError(
            "expected one similarity and one time per layer for attention and MLP; got "
            f"{layers} and {len(mlp_similarity)} similarities, {len(attn_ms)} and {len(mlp_ms)} times"
        )
    if not all(math.isfinite(value) for value in (*attn_similarity, *mlp_similarity)):
        raise SkipError("a similarity is not finite: the statistics come from a model that produced NaN or inf")
    if not all(math.isfinite(value) and value > 0 for value in (*attn_ms, *mlp_ms)):
        raise SkipError("expected sublayer times above 0 ms; measure them again on this machine")
    if not 0 < ratio < 1:
        raise SkipError(f"expected a share of the time to save, above 0 and below 1; got {ratio!r}")

    candidates = sorted(
        ((1 - similarity) / ms, part, layer, ms)
        for part, similarities, times in (("attn", attn_similarity, attn_ms), ("mlp", mlp_similarity, mlp_ms))
        for layer, (similarity, ms) in enumerate(zip(similarities, times, strict=True))
    )
    total = sum(attn_ms) + sum(mlp_ms)
    goal, saved = ratio * total, 0.0
    left_out: dict[str, list[int]] = {"attn": [], "mlp": []}
    for _, part, layer, ms in candidates:
        if saved + ms - goal > goal - saved or (part == "attn" and len(left_out["attn"]) == layers - 1):
            continue
        left_out[part].append(layer)
        saved += ms
    return SublayerSets(tuple(sorted(left_out["attn"])), tuple(sorted(left_out["mlp"])), saved / total)
