"""What every piece is told: where to run, how large, and until when."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TypeVar

import torch

V = TypeVar("V")


@dataclass(frozen=True)
class Setting:
    """Where and how a piece runs.

    Attributes:
        dry: tiny shapes, so that every line runs on a CPU.
        device: `"cuda"` or `"cpu"`.
        until: the moment of `time.monotonic()` at which the piece should be done; no round starts that ends later.
    """

    dry: bool = False
    device: str = "cuda"
    until: float = float("inf")

    @property
    def dtype(self) -> torch.dtype:
        """Of the large models, dry too: what fails in this precision fails there."""
        return torch.bfloat16

    @property
    def left(self) -> float:
        """Seconds until the piece should be done."""
        return self.until - time.monotonic()

    def pick(self, full: V, dry: V) -> V:
        """One value for the machine, another for the dry form."""
        return dry if self.dry else full
