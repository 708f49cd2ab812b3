"""The state of a training that goes on elsewhere: averaged weights, small enough to commit.

The optimisers' momentum is not kept. A run that starts from here takes the averaged weights for its own, warms up over
a hundred steps with momentum anew, and goes on counting. A run writes them in fp16; what is committed has matrices in
eight bits, a scale for each row, which halves the file:

    python -m demos.bundled_model.wan.progress runs/t2v/progress.safetensors
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
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
SCALE = ".scale"  # ends the name of a matrix's scales, `[rows]`


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


def shrink(source: Path, path: Path = FILE) -> None:
    """Write a run's file again with its matrices in eight bits."""
    state: dict[str, Tensor] = {}
    with safe_open(source, "pt") as file:
        notes = file.metadata()
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            if tensor.ndim < 2:
                state[name] = tensor
                continue
            rows = tensor.float().flatten(1)
            scale = (rows.abs().amax(1) / 127).clamp(min=1e-8).half()
            state[name] = (tensor.float() / _spread(scale, tensor)).round().clamp(-127, 127).to(torch.int8)
            state[name + SCALE] = scale
    atomically(path, lambda partial: save_file(state, partial, metadata=notes))


def _spread(scale: Tensor, like: Tensor) -> Tensor:
    """A scale for each row, as something to multiply with."""
    return scale.float().view(-1, *(1 for _ in like.shape[1:]))


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
        scales = {name for name in file.keys() if name.endswith(SCALE)}  # noqa: SIM118
        if missing := set(params) ^ (set(file.keys()) - scales):
            raise SkipError(f"{path} and the model have different weights: {sorted(missing)[:4]} ...")
        for name, param in params.items():
            tensor = file.get_tensor(name)
            if name + SCALE in scales:
                tensor = tensor.float() * _spread(file.get_tensor(name + SCALE), tensor)
            param.copy_(tensor)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a run's progress.safetensors")
    parser.add_argument("--out", type=Path, default=FILE, help="what is committed (default: %(default)s)")
    args = parser.parse_args(arguments)
    shrink(args.source, args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB, {read_progress(args.out)}")


if __name__ == "__main__":
    main()
