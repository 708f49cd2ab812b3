"""Route: from which earlier pass, and from which block on, each skipped pass of a step has to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from skipguide.plan import SkipPlan

Signature = dict[int, frozenset[str]]
PLAIN = -1


@dataclass(frozen=True)
class Leg:
    """One skipped pass.

    Attributes:
        plan: what it skips from where it starts.
        parent: the earlier leg that it shares its beginning with; -1 is the plain pass.
        start: the first block at which it differs from that one; None: it runs from the beginning.
        blocks: how many blocks it runs.
    """

    plan: SkipPlan
    parent: int
    start: int | None
    blocks: int


def signature(plan: SkipPlan) -> Signature:
    """Block -> the parts that a plan (in execution order) skips of it."""
    found: dict[int, set[str]] = {}
    for term in plan.terms:
        for layer in term.layers:
            found.setdefault(layer, set()).add(term.part)
    return {layer: frozenset(parts) for layer, parts in found.items()}


def divergence(a: Signature, b: Signature) -> int | None:
    """The first block at which two passes differ; None if they are the same."""
    return min((layer for layer in a.keys() | b.keys() if a.get(layer) != b.get(layer)), default=None)


def route(plans: Sequence[SkipPlan], blocks: int, reuse: bool = True) -> tuple[Leg, ...]:
    """A leg per plan, each from the earlier pass that it shares the longest beginning with.

    Args:
        plans: what each pass skips, in execution order; no two the same, none empty.
        blocks: how many blocks the model has.
        reuse: False runs every leg from the beginning.

    Example:
        >>> legs = route([SkipPlan([4, 8]), SkipPlan([4, 9])], blocks=12)
        >>> [(leg.parent, leg.start, leg.blocks) for leg in legs]
        [(-1, 4, 6), (0, 8, 3)]
    """
    passes: list[Signature] = [{}]  # the plain pass, then the legs
    legs: list[Leg] = []
    for plan in plans:
        own = signature(plan)
        shared = [at if (at := divergence(own, other)) is not None else blocks for other in passes]
        start = max(shared) if reuse else None
        # of several with the same beginning the earliest: its activations are kept anyway
        parent = shared.index(start) - 1 if start is not None else PLAIN
        passes.append(own)
        rest = {layer: parts for layer, parts in own.items() if layer >= (start or 0)}
        removed = sum("block" in parts for parts in rest.values())
        legs.append(Leg(_plan(rest), parent, start, blocks - (start or 0) - removed))
    return tuple(legs)


def _plan(parts: Signature) -> SkipPlan:
    by_part: dict[str, list[int]] = {}
    for layer, names in sorted(parts.items()):
        for name in sorted(names):
            by_part.setdefault(name, []).append(layer)
    plan = SkipPlan()
    for name, layers in by_part.items():
        term = SkipPlan(layers, part=name)  # type: ignore[arg-type]
        plan = term if plan.empty else plan | term
    return plan
