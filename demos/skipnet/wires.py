"""Wires: images whose needed depth differs, because an answer has to be followed along a path of random length.

Every image has four wires on a dark ground. Each ends in a coloured cell, red, green, blue or yellow; one of them
begins with a white cell. The class is the colour at the other end of the white one's wire. All four colours are in
every image, so that nothing short of following the wire tells them apart, and a 3x3 convolution follows it by one cell
from either end: short wires need few blocks, long ones many.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from skipguide.errors import SkipError

COLOURS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
WIRE = 0.45
_MOVES = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])


@dataclass(frozen=True)
class Wires:
    """A set of images.

    Attributes:
        images: `[N, 3, size, size]` in [0, 1].
        labels: `[N]`, place of the colour in `COLOURS`.
        lengths: `[N]`, steps from the white cell to the coloured one: the difficulty.
    """

    images: Tensor
    labels: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def make_wires(count: int, size: int = 12, longest: int = 12, seed: int = 0) -> Wires:
    """Draw images.

    The length of the wire that counts is drawn evenly from 1 to `longest`; where it runs into a corner before, it is as
    long as it got. The other three are as long as there is room for, up to `longest`. Wires do not touch.

    Args:
        count: number of images.
        size: pixels a side, one per cell.
        longest: most steps of a wire.
        seed: of everything.

    Raises:
        SkipError: for an image that four wires cannot fit into.

    Example:
        >>> wires = make_wires(3, seed=1)
        >>> wires.images.shape, wires.labels.shape, bool((wires.lengths >= 1).all())
        (torch.Size([3, 3, 12, 12]), torch.Size([3]), True)
    """
    if count < 1 or size < 8 or longest < 1:
        raise SkipError(f"expected count >= 1, size >= 8 and longest >= 1; got {count}, {size}, {longest}")
    random = torch.Generator().manual_seed(seed)
    found: list[Wires] = []
    while (missing := count - sum(map(len, found))) > 0:
        found.append(_draw(missing + missing // 4 + 8, size, longest, random))
    return Wires(*(torch.cat([getattr(w, f) for w in found])[:count] for f in ("images", "labels", "lengths")))


def _draw(count: int, size: int, longest: int, random: torch.Generator) -> Wires:
    taken = torch.zeros(count, size, size)
    order = torch.rand(count, 4, generator=random).argsort(1)  # wire 0 of every image gets colour order[:, 0]
    images = torch.zeros(count, 3, size, size)
    good = torch.ones(count, dtype=torch.bool)
    lengths = torch.zeros(count, dtype=torch.long)
    for wire in range(4):
        begin, cells, end, steps = _walk(taken, size, longest, random)
        good &= steps > 0
        lengths = steps if wire == 0 else lengths
        rows = torch.arange(count)
        images += WIRE * cells[:, None]
        images[rows, :, end[:, 0], end[:, 1]] = COLOURS[order[:, wire]]
        if wire == 0:
            images[rows, :, begin[:, 0], begin[:, 1]] = 1.0
        taken = (taken + cells).clamp(max=1)
    return Wires(images[good], order[good, 0], lengths[good])


def _walk(taken: Tensor, size: int, longest: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One self-avoiding walk per image that keeps a free cell between itself and everything else."""
    count = len(taken)
    rows = torch.arange(count)
    free = functional.max_pool2d(taken[:, None], 3, 1, 1)[:, 0] == 0
    scores = torch.rand(count, size, size, generator=random).where(free, torch.tensor(-1.0))
    place = scores.flatten(1).argmax(1)
    here = torch.stack([place // size, place % size], 1)
    begin, before, cells = here, here, torch.zeros_like(taken)
    cells[rows, here[:, 0], here[:, 1]] = 1
    wanted = torch.randint(1, longest + 1, (count,), generator=random)
    steps = torch.zeros(count, dtype=torch.long)
    alive = free.flatten(1).any(1)
    for _ in range(longest):
        around = functional.conv2d((taken + cells)[:, None], torch.ones(1, 1, 3, 3), padding=1)[:, 0]
        options = here[:, None] + _MOVES  # [N, 4, 2]
        inside = ((options >= 0) & (options < size)).all(2)
        at = options.clamp(0, size - 1)
        crowd = around[rows[:, None], at[..., 0], at[..., 1]]
        own = 1 + ((options - before[:, None]).abs().amax(2) <= 1).float() * (steps > 0).float()[:, None]
        new = cells[rows[:, None], at[..., 0], at[..., 1]] == 0
        can = inside & new & (crowd - own <= 0)
        pick = torch.rand(count, 4, generator=random).where(can, torch.tensor(-1.0)).argmax(1)
        goes = alive & can.any(1) & (steps < wanted)
        there = at[rows, pick]
        before = torch.where(goes[:, None], here, before)
        here = torch.where(goes[:, None], there, here)
        cells[rows[goes], here[goes, 0], here[goes, 1]] = 1
        steps = steps + goes
        alive = goes
    return begin, cells, here, steps


def turn_and_recolour(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Augmentation that keeps the task: one of the eight turns of the square, and the three pure colours exchanged.

    The turn is drawn once per batch, the colours once per image; yellow, red + green, becomes what its parts become,
    so only exchanges of red and green are drawn.
    """
    turn = int(torch.randint(8, (1,), generator=generator))
    images = torch.rot90(images, turn % 4, (2, 3))
    if turn >= 4:
        images = images.flip(3)
    swap = torch.rand(len(images), generator=generator) < 0.5
    swapped = images[:, [1, 0, 2]]
    images = torch.where(swap[:, None, None, None], swapped, images)
    labels = torch.where(swap & (labels < 2), 1 - labels, labels)
    return images, labels
