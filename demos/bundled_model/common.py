"""What the training scripts share: averages, wall-clock schedules, atomic files, contact sheets."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor, nn

from skipguide.files import replacing


class Ema:
    """Exponential moving average of a module's parameters, short-sighted at first."""

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.decay = decay
        self.steps = 0
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        params = dict(module.named_parameters())
        torch._foreach_lerp_(list(self.shadow.values()), [params[k].detach() for k in self.shadow], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        for name, p in module.named_parameters():
            p.copy_(self.shadow[name])

    def state_dict(self) -> dict[str, object]:
        return {"steps": self.steps, "shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        self.steps, self.shadow = state["steps"], state["shadow"]


class Clock:
    """Progress from 0 to 1 over a budget of wall-clock minutes; time spent before a resume counts."""

    def __init__(self, minutes: float, spent: float = 0.0) -> None:
        self.seconds = 60 * minutes
        self.start = time.monotonic() - spent

    @property
    def spent(self) -> float:
        return time.monotonic() - self.start

    @property
    def progress(self) -> float:
        return min(1.0, self.spent / self.seconds)


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbour of `path`, then rename it into place."""
    with replacing(path) as (partial,):
        write(partial)


def save_half(model: nn.Module, path: Path) -> None:
    """Write a model's weights as fp16."""
    state = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    atomically(path, lambda partial: save_file(state, partial))


def log_row(path: Path, row: dict[str, float | int | str]) -> None:
    """Append one row to a CSV file, with a header if the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def contact_sheet(path: Path, rows: Sequence[tuple[str, Tensor]], frames: int = 8, zoom: int = 2) -> None:
    """Write clips `[T, 3, H, W]` in [0, 1] as labelled rows of `frames` evenly spaced frames."""
    side, margin = 64 * zoom, 16
    sheet = Image.new("RGB", (side * frames, (side + margin) * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (label, clip) in enumerate(rows):
        top = row * (side + margin)
        draw.text((4, top + 2), label, fill="black")
        for column, frame in enumerate(torch.linspace(0, len(clip) - 1, frames).round().long().tolist()):
            pixels = (clip[frame].permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
            tile = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(tile, (column * side, top + margin))
    atomically(path, sheet.save)
