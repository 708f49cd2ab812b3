"""Several processes that train one model: each takes a share of the batch, all take the same step.

A small transformer keeps one core busy and hardly gains from a second thread. Two processes that average their
gradients make nearly twice the clips a second. `torchrun` starts them; alone, a process is a team of one.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn


class Team:
    """The processes of a training, by the environment that `torchrun` sets."""

    def __init__(self) -> None:
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("gloo")

    @property
    def leads(self) -> bool:
        """Whether this is the process that measures and saves."""
        return self.rank == 0

    def share(self, batch: int) -> int:
        """How many clips of a batch this process takes."""
        return batch // self.size + (self.rank < batch % self.size)

    def average_gradients(self, model: nn.Module, weight: float) -> None:
        """Give every process the sum of the gradients, each weighted by its share of the batch."""
        if self.size == 1:
            return
        grads = [param.grad for param in model.parameters() if param.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads]).mul_(weight)
        dist.all_reduce(flat)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def go_on(self, left: float) -> float:
        """The minutes that are left by the first process's clock, 0 once any process is to stop."""
        if self.size == 1:
            return left
        values = torch.tensor([left if self.leads else 0.0, float(left <= 0)], dtype=torch.float64)
        dist.all_reduce(values)
        return 0.0 if values[1] > 0 else float(values[0])

    def align(self, model: nn.Module) -> None:
        """Copy the first process's weights to all: kernels may round differently from core to core."""
        if self.size > 1:
            with torch.no_grad():
                for param in model.parameters():
                    dist.broadcast(param.data, 0)

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()
