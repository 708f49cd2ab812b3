"""A network in training, small enough to be committed: 16 bits for each weight, compressed to about 11."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from skipguide.errors import SkipError
from skipguide.files import replacing


@dataclass(frozen=True)
class SmallState:
    """Where a run is, and its weights and statistics; what the optimiser remembers is left out.

    Attributes:
        run: name of the run.
        stage: number of its stage.
        step: steps of that stage that are done.
        values: all floating-point numbers of the network, in the order of its state dict, as bfloat16 `[N]`.
        counts: all whole numbers, likewise, int64 `[M]`.
    """

    run: str
    stage: int
    step: int
    values: Tensor
    counts: Tensor

    @classmethod
    def of(cls, net: dict[str, Tensor], run: str, stage: int = 0, step: int = 0) -> SmallState:
        """The state dict of a network, rounded."""
        floats = [value.flatten().bfloat16() for value in net.values() if value.is_floating_point()]
        whole = [value.flatten().long() for value in net.values() if not value.is_floating_point()]
        return cls(run, stage, step, torch.cat(floats), torch.cat([*whole, torch.zeros(0, dtype=torch.long)]))

    @classmethod
    def read(cls, path: Path) -> SmallState:
        """What `write` wrote."""
        with np.load(path) as data:
            pairs = np.ascontiguousarray(np.stack([data["low"], data["high"]], 1))
            values = torch.from_numpy(pairs.view(np.int16)[:, 0].copy()).view(torch.bfloat16)
            counts = torch.from_numpy(data["counts"].copy())
            return cls(str(data["run"]), int(data["stage"]), int(data["step"]), values, counts)

    def write(self, path: Path) -> None:
        """Into one file. The high bytes, sign and exponent, compress well when they stand together."""
        low, high = self.values.view(torch.int16).numpy().view(np.uint8).reshape(-1, 2).T
        about = {"run": np.array(self.run), "stage": np.array(self.stage), "step": np.array(self.step)}
        with replacing(path) as (partial,), partial.open("wb") as file:
            np.savez_compressed(file, low=low, high=high, counts=self.counts.numpy(), **about)

    @torch.no_grad()
    def restore(self, net: nn.Module) -> None:
        """Put the numbers into a network of the same shape.

        Raises:
            SkipError: for another network.
        """
        own = net.state_dict()
        expected = [sum(v.numel() for v in own.values() if v.is_floating_point() is kind) for kind in (True, False)]
        if expected != (found := [self.values.numel(), self.counts.numel()]):
            raise SkipError(
                f"the state of {self.run} is of another network: expected {expected[0]} weights and {expected[1]} "
                f"counts; got {found[0]} and {found[1]}: delete it to start that run again"
            )
        at = {True: 0, False: 0}
        for value in own.values():
            kind = value.is_floating_point()
            source = self.values if kind else self.counts
            value.copy_(source[at[kind] : at[kind] + value.numel()].view(value.shape))
            at[kind] += value.numel()
