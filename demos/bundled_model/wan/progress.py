"""The state of a training that goes on elsewhere: averaged weights in fp16, small enough to commit.

The optimisers' momentum is not kept. A run that starts from here takes the averaged weights for its own, warms up over
a hundred steps with momentum anew, and goes on counting.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from demos.bundled_model.common import Ema, atomically
from demos.bundled_model.wan.model import Shape
from skipguide.errors import SkipError

FILE = Path(__file__).with_name("progress.safetensors")


@dataclass
class Progress:
    """How far a training has come, over all the machines it ran on.

    Args:
        shape: of the transformer.
        steps: optimiser steps.
        clips: clips seen.
        encoded: number of the next clip to encode.
        minutes: of training.
        probe: loss of the averaged weights on clips that never change, last measured.
    """

    shape: Shape
    steps: int = 0
    clips: int = 0
    encoded: int = 0
    minutes: float = 0.0
    probe: float = float("nan")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"minutes": round(self.minutes, 1), "probe": round(self.probe, 5)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        return cls(**{**values, "shape": Shape.from_dict(values["shape"])})


def write_progress(path: Path, ema: Ema, progress: Progress) -> None:
    """The averaged weights with what is known about them."""
    state = {name: tensor.half().contiguous() for name, tensor in ema.shadow.items()}
    notes = {"progress": json.dumps(progress.to_dict())}
    atomically(path, lambda partial: save_file(state, partial, metadata=notes))


def read_progress(path: Path) -> Progress:
    """How far the training in a file has come; reads no weights."""
    with safe_open(path, "pt") as file:
        return Progress.from_dict(json.loads(file.metadata()["progress"]))


def load_weights(path: Path, model: nn.Module) -> None:
    """Copy the averaged weights into a `T2V` of the file's shape.

    Raises:
        SkipError: for a model of another shape.
    """
    params: dict[str, Tensor] = dict(model.named_parameters())
    with safe_open(path, "pt") as file, torch.no_grad():
        if missing := set(params) ^ set(file.keys()):
            raise SkipError(f"{path} and the model have different weights: {sorted(missing)[:4]} ...")
        for name, param in params.items():
            param.copy_(file.get_tensor(name))
