"""Plans and the batch of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from demos.training import rows_of_step
from skipguide.vision.floorplan import GraphBatch, Plan, collate, generate_plan


def made_up(first: int, count: int, size: int) -> list[Plan]:
    """Plans from seed `first` on."""
    return [generate_plan(seed, size) for seed in range(first, first + count)]


def batch(
    plans: Sequence[Plan], size: int, step: int, seed: int, rank: int = 0, world: int = 1
) -> tuple[Tensor, GraphBatch, Tensor]:
    """Plans turned and mirrored at random, which changes no graph: a function of the step's number."""
    generator = torch.Generator().manual_seed((1_000_003 * seed + step) * 4096 + rank)
    chosen = []
    for row in rows_of_step(len(plans), size, step, seed, rank, world).tolist():
        plan = plans[row]
        assert plan.target is not None
        joined = torch.cat([plan.image, plan.target[None].to(plan.image.dtype)])
        turn, mirror = torch.randint(4, (2,), generator=generator).tolist()
        square = joined.shape[1] == joined.shape[2]
        joined = torch.rot90(joined, turn if square else 2 * (turn % 2), (1, 2))
        joined = joined.flip(2) if mirror % 2 else joined
        chosen.append(Plan(joined[:-1], plan.graph, joined[-1].long(), plan.name))
    images, graphs, targets = collate(chosen)
    assert targets is not None
    return images, graphs, targets
