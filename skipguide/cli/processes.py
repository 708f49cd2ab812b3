"""Processes: which one of several this is, when a command runs under `accelerate launch`."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from skipguide.cli import models
from skipguide.errors import SkipError

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Process:
    """One process among several.

    Args:
        rank: its number, from 0.
        world: how many there are.
        device: what it runs on.
        shows: whether it is the one that shows bars and prints.
    """

    rank: int
    world: int
    device: str
    shows: bool = True

    def order(self, work: Sequence[T]) -> list[T]:
        """The work, beginning with this process' share, so that two processes seldom start on the same item."""
        first = self.rank * len(work) // self.world
        return [*work[first:], *work[:first]]


def launched() -> int:
    """How many processes `accelerate launch` (or torchrun) started; 1 without it.

    Raises:
        SkipError: if the environment has something else than their number.
    """
    count = os.environ.get("WORLD_SIZE") or "1"
    if not count.isdecimal() or int(count) < 1:
        raise SkipError(
            f"expected WORLD_SIZE as the number of processes, from 1 on; got {count!r}: unset it, or start them with "
            "accelerate launch or torchrun"
        )
    return int(count)


def this_process(device: str) -> Process:
    """Which one of the launched processes this is, and its device.

    The ranks are told by the environment, as `accelerate launch` and torchrun set it. No process group is made:
    processes that share files through locks have nothing to say to each other, and one that died before it joined
    would keep the others waiting.

    Args:
        device: as on the command line; `auto` and a bare `cuda` become this process' own.

    Raises:
        SkipError: if the environment does not say which one this is, or contradicts itself.
    """
    chosen, world = models.choose_device(device), launched()
    if world == 1:
        if os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ:
            logger.warning(
                "accelerate launch --cpu starts one process without mpirun, whatever --num_processes says: use "
                "accelerate launch --multi_gpu or torchrun --nproc_per_node, or start this command several times"
            )
        if "WORLD_SIZE" in os.environ and os.environ.get("RANK"):
            _number("RANK", 1)
        return Process(0, 1, chosen)
    rank, local = _number("RANK", world), _number("LOCAL_RANK", world)
    if chosen == "cuda":
        import torch

        chosen = f"cuda:{local % torch.cuda.device_count()}"
    return Process(rank, world, chosen, shows=rank == 0)


def _number(name: str, world: int) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal() or int(text) >= world:
        there = f"there are {world} processes" if world > 1 else "there is 1 process"
        raise SkipError(
            f"WORLD_SIZE says {there}, but {name} is {text!r}: which one is this? Expected 0 to {world - 1}"
        )
    return int(text)


def refuse_several(command: str, instead: str) -> None:
    """Refuse to make one and the same file in several processes.

    Raises:
        SkipError: under `accelerate launch` with more than one process.
    """
    if (count := launched()) > 1:
        raise SkipError(f"{command} makes one file, and {count} processes would all make it: {instead}")
