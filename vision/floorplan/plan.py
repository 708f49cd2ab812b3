"""A floor plan and its classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skipguide.errors import SkipError
from skipguide.vision.floorplan.graph import GraphBatch, LayoutGraph

CLASSES = (
    "Bedroom",
    "Living room",
    "Kitchen",
    "Dining",
    "Corridor",
    "Stairs",
    "Storeroom",
    "Bathroom",
    "Balcony",
    "Structure",
    "Background",
)
STRUCTURE, BACKGROUND = 9, 10
IGNORE = 255
# What a zone of the layout graph may hold.
ZONES = ((0,), (1, 2, 3, 4), (5, 6, 7), (8,))


@dataclass(frozen=True, eq=False)
class Plan:
    """One plan.

    Attributes:
        image: `[3, H, W]`, as `preprocess` makes it.
        graph: its rooms and connections.
        target: `[H, W]`, a class per pixel, or None where it is not known.
        name: the plan's id.
    """

    image: Tensor
    graph: LayoutGraph
    target: Tensor | None = None
    name: str = ""


def as_classes(values: Tensor) -> Tensor:
    """A class per pixel `[H, W]` on the CPU, from such a map or from logits `[classes, H, W]`.

    Raises:
        SkipError: for logits with NaN, whose largest would be class 0.
    """
    found = values.detach().cpu()
    if found.is_floating_point() and bool(torch.isnan(found).any()):
        raise SkipError("expected finite logits; got NaN: check the images and the weights")
    return found.argmax(0) if found.ndim == 3 and found.is_floating_point() else found


def collate(plans: Sequence[Plan]) -> tuple[Tensor, GraphBatch, Tensor | None]:
    """Images `[N, 3, H, W]`, graphs and targets `[N, H, W]` of plans of one size (None if a target is missing).

    Use it as `collate_fn` of a `DataLoader`.
    """
    if len({plan.image.shape for plan in plans}) != 1:
        raise SkipError(f"expected plans of one size; got {sorted({tuple(plan.image.shape) for plan in plans})}")
    targets = [plan.target for plan in plans if plan.target is not None]
    joined = torch.stack(targets) if len(targets) == len(plans) else None
    return torch.stack([plan.image for plan in plans]), GraphBatch.of([plan.graph for plan in plans]), joined
