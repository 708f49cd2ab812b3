"""The state of a training that goes on elsewhere: the averaged weights, which are what ships, and how far they are.

The optimisers' momentum is not kept. A run that starts from the pipeline's folder takes its weights for its own, warms
up over a hundred steps with momentum anew, and goes on counting from the folder's `training.json`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from demos.bundled_model.common import Ema, atomically
from demos.bundled_model.model import Shape
from skipguide.assets import bundled
from skipguide.errors import SkipError

FOLDER = bundled()
NOTES = "training.json"  # in a pipeline's folder
PARTS = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


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
    """How far a training has come, by a run's file or a pipeline's folder; reads no weights."""
    if path.is_dir():
        return Progress.from_dict(json.loads((path / NOTES).read_text(encoding="utf-8")))
    with safe_open(path, "pt") as file:
        return Progress.from_dict(json.loads(file.metadata()["progress"]))


def load_weights(path: Path, model: nn.Module) -> None:
    """Copy the averaged weights of a run's file or a pipeline's folder into a `T2V` of that shape.

    Raises:
        SkipError: for a model of another shape.
    """
    if path.is_dir():
        parts = {part: load_file(path / name) for part, name in PARTS.items()}
        found = {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}
    else:
        found = load_file(path)
    params = dict(model.named_parameters())
    fits = params.keys() == found.keys() and all(param.shape == found[name].shape for name, param in params.items())
    if not fits:
        raise SkipError(f"{path} and the model have different weights: {sorted(set(params) ^ set(found))[:4]} ...")
    with torch.no_grad():
        for name, param in params.items():
            param.copy_(found[name])
