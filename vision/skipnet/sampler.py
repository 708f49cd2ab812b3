"""Which images each training step sees, in every process; a resumed run sees the same ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from skipguide.vision.skipnet.train_config import TrainConfig


class StepSampler:
    """The numbers of the images of every step from `start` on: epochs in an order that the seed and epoch give."""

    def __init__(self, size: int, config: TrainConfig, start: int, process: int, processes: int) -> None:
        self.size, self.config, self.start = size, config, start
        self.process, self.processes = process, processes

    def __len__(self) -> int:
        return self.config.steps - self.start

    def __iter__(self) -> Iterator[list[int]]:
        batch = self.config.batch_size * self.processes
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        for step in range(self.start, self.config.steps):
            numbers = []
            for place in range(step * batch + self.process, (step + 1) * batch, self.processes):
                if place // self.size != epoch:
                    epoch = place // self.size
                    random = torch.Generator().manual_seed((self.config.seed * 7919 + epoch) % 2**64)
                    order = torch.randperm(self.size, generator=random)
                numbers.append(int(order[place % self.size]))
            yield numbers


def batches(
    data: Dataset[Any], config: TrainConfig, start: int, accelerator: Any, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images and labels of every step from `start` on, for this process."""
    process, processes = int(accelerator.process_index), int(accelerator.num_processes)
    sampler = StepSampler(len(cast(Any, data)), config, start, process, processes)
    if isinstance(data, TensorDataset):
        images, labels = data.tensors
        for numbers in sampler:
            yield images[numbers], labels[numbers]
    else:
        yield from DataLoader(data, batch_sampler=cast(Any, sampler), num_workers=workers)
