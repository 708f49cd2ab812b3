"""Every perturbation: what a plan says, and the model with it by hand. One row each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from zoo import perturbed
from zoo.family import Family
from zoo.perturbed import GRIDS, Grid

# (length of an axis, size of a window) -> where the windows begin, on paper
STARTS = {(2, 1): (0, 1), (2, 2): (0,), (3, 2): (0, 1), (4, 2): (0, 2), (4, 3): (0, 1), (3, 3): (0,), (1, 1): (0,)}


def windows(grid: Grid, sizes: tuple[int, int, int]):
    """The windows of some sizes, as ranges of frames, rows and columns."""
    axes = [
        [range(first, first + size) for first in STARTS[length, size]] for length, size in zip(grid, sizes, strict=True)
    ]
    return [(t, y, x) for t in axes[0] for y in axes[1] for x in axes[2]]


def in_time(grid: Grid):
    return perturbed.windowed(grid, windows(grid, (1, *grid[1:])))


def in_space(size: int | None):
    def made(grid: Grid):
        side = size or {3: 2, 4: 3}[grid[1]]  # 5/8 of the side, rounded up
        return perturbed.windowed(grid, windows(grid, (grid[0], side, side)))

    return made


@dataclass(frozen=True)
class Row:
    """One perturbation.

    Attributes:
        part: its name.
        told: what else the plan says.
        attend: grid -> what attention does then.
        move: (layer, what is told) -> how the block's first stream is moved before it.
        video: whether it is about videos alone.
    """

    part: str
    told: dict[str, Any] = field(default_factory=dict)
    attend: Callable[[Grid], Any] | None = None
    move: Callable[[int, dict[str, Any]], Any] | None = None
    video: bool = False

    def fits(self, family: str) -> bool:
        return not self.video or GRIDS[family][0] > 1

    def by_hand(self, family: Family, model: nn.Module, layer: int) -> nn.Module:
        """A copy of the model with it in one block."""
        if self.move is not None:
            return perturbed.moved(family, model, layer, self.move(layer, self.told))
        assert self.attend is not None
        return perturbed.written_out(family, model, layer, family.inputs(1), self.attend(GRIDS[family.name]))


def options(told: dict[str, Any]) -> dict[str, Any]:
    return told.get("part_options", {})


PERTURBATIONS: dict[str, Row] = {
    "identity of a head": Row("attn_identity", {"heads": [1]}, lambda _: perturbed.towards_identity(1, (1,))),
    "soft identity": Row("attn_identity", {"strength": 0.3}, lambda _: perturbed.towards_identity(0.3, (0, 1))),
    "soft identity of a head": Row(
        "attn_identity", {"strength": 0.7, "heads": 0}, lambda _: perturbed.towards_identity(0.7, (0,))
    ),
    "blur": Row("attn_blur", {"part_options": {"sigma": 0.7}}, lambda grid: perturbed.blurred(grid, 0.7)),
    "blur to the mean": Row("attn_blur", {}, lambda grid: perturbed.blurred(grid, None)),
    "time": Row("window_time", {}, in_time, video=True),
    "space": Row("window_space", {}, in_space(None)),
    "space of two": Row("window_space", {"part_options": {"window": 2}}, in_space(2)),
    "shuffle": Row(
        "token_shuffle",
        {"part_options": {"seed": 3}},
        move=lambda layer, told: perturbed.shuffle(options(told)["seed"], layer),
    ),
    "swap": Row("self_swap", {}, move=lambda *_: perturbed.swap_both),
    "swap in space": Row(
        "self_swap",
        {"part_options": {"over": "space", "ratio": 0.4}},
        move=lambda *_: lambda x: perturbed.swap_both(x, 0.4, "space"),
    ),
    "half a swap of channels": Row(
        "self_swap",
        {"strength": 0.5, "part_options": {"over": "channels", "ratio": 0.2}},
        move=lambda *_: lambda x: torch.lerp(x, perturbed.swap_both(x, 0.2, "channels"), 0.5),
    ),
}
