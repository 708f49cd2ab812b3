"""Shared prefixes: a skipped pass starts where it first differs from an earlier pass of its step; from which, where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from skipguide.hosts.diffusers_caches import Reach
from skipguide.parts import Perturbation
from skipguide.plan import SkipPlan

Signature = dict[int, tuple[Perturbation, ...]]
PLAIN = -1


@dataclass(frozen=True)
class SharedPass:
    """One skipped pass.

    Attributes:
        plan: what it skips from where it starts.
        parent: number of the earlier skipped pass that it shares its beginning with; -1 is the plain pass.
        start: the first block at which it differs from that one; None: it runs from the beginning.
        blocks: how many blocks it runs.
    """

    plan: SkipPlan
    parent: int
    start: int | None
    blocks: int


def signature(plan: SkipPlan) -> Signature:
    """Block -> how a plan (in execution order) weakens it, in the order of its terms."""
    found: dict[int, tuple[Perturbation, ...]] = {}
    for term in plan.terms:
        for layer in term.layers:
            found[layer] = tuple(dict.fromkeys((*found.get(layer, ()), term.perturbation.at(layer))))
    return found


def divergence(a: Signature, b: Signature) -> int | None:
    """The first block at which two passes differ; None if they are the same."""
    return min((layer for layer in a.keys() | b.keys() if a.get(layer) != b.get(layer)), default=None)


def share_prefixes(plans: Sequence[SkipPlan], blocks: int, reuse: bool = True) -> tuple[SharedPass, ...]:
    """A pass per plan, each from the earlier pass that it shares the longest beginning with.

    Args:
        plans: what each pass skips, in execution order; no two the same, none empty.
        blocks: how many blocks the model has.
        reuse: False runs every pass from the beginning.

    Example:
        >>> shared = share_prefixes([SkipPlan([4, 8]), SkipPlan([4, 9])], blocks=12)
        >>> [(each.parent, each.start, each.blocks) for each in shared]
        [(-1, 4, 6), (0, 8, 3)]
    """
    passes: list[Signature] = [{}]  # the plain pass, then the skipped ones
    found: list[SharedPass] = []
    for plan in plans:
        own = signature(plan)
        places = [at if (at := divergence(own, other)) is not None else blocks for other in passes]
        start = max(places) if reuse else None
        # of several with the same beginning the earliest: its activations are kept anyway
        parent = places.index(start) - 1 if start is not None else PLAIN
        passes.append(own)
        rest = {layer: ways for layer, ways in own.items() if layer >= (start or 0)}
        removed = sum(any(how.removes for how in ways) for ways in rest.values())
        found.append(SharedPass(_plan(rest), parent, start, blocks - (start or 0) - removed))
    return tuple(found)


def shared_under(reach: Reach, plans: Sequence[SkipPlan], blocks: int, reuse: bool) -> tuple[SharedPass, ...]:
    """The same where a cache may answer a pass: only the plain one is sure to be the beginning of each.

    Args:
        reach: how much of the model the cache answers for.
        plans: as in `share_prefixes`.
        blocks: as there.
        reuse: as there.
    """
    if not reach.blocks or not reuse or reach.whole:
        return share_prefixes(plans, blocks, reuse and not reach.whole)
    found = [share_prefixes([plan], blocks)[0] for plan in plans]
    # the last blocks run on what the cache has answered: what the plain pass had there may be something else
    late = [each.start is not None and each.start >= blocks - reach.last for each in found]
    return tuple(
        share_prefixes([plan], blocks, reuse=False)[0] if each_late else each
        for plan, each, each_late in zip(plans, found, late, strict=True)
    )


def _plan(ways: Signature) -> SkipPlan:
    by_way: dict[Perturbation, list[int]] = {}
    for layer, own in sorted(ways.items()):
        for how in own:
            by_way.setdefault(how, []).append(layer)
    plan = SkipPlan()
    for how, layers in by_way.items():
        term = SkipPlan(layers, **how.fields)
        plan = term if plan.empty else plan | term
    return plan
