"""Processes: which one of several this is, when a command runs under `accelerate launch`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from skipguide.cli import models
from skipguide.errors import SkipError

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
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
        """The work, beginning with this process' share, so that processes seldom want the same thing."""
        first = self.rank * len(work) // self.world
        return [*work[first:], *work[:first]]


def launched() -> int:
    """How many processes `accelerate launch` (or torchrun) started; 1 without it."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdecimal() else 1


@contextmanager
def joined(device: str) -> Iterator[Place]:
    """This process' place inside the block; a single process is not bothered with any of it.

    Args:
        device: as on the command line; `auto` and a bare `cuda` become this process' own.
    """
    chosen = models.choose_device(device)
    if launched() == 1:
        if os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ:
            logger.warning(
                "accelerate launch --cpu starts one process without mpirun, whatever --num_processes says: use "
                "accelerate launch --multi_gpu or torchrun --nproc_per_node, or start this command several times"
            )
        yield Place(0, 1, chosen)
        return
    from accelerate import PartialState

    state = PartialState(cpu=chosen == "cpu")  # gloo on the CPU
    try:
        own = str(state.device) if device in ("auto", "cuda") else chosen
        yield Place(state.process_index, state.num_processes, own, state.is_main_process)
    finally:
        state.destroy_process_group()


def alone(command: str, instead: str) -> None:
    """Refuse to make one and the same file in several processes.

    Raises:
        SkipError: under `accelerate launch` with more than one process.
    """
    if (count := launched()) > 1:
        raise SkipError(f"{command} makes one file, and {count} processes would all make it: {instead}")
