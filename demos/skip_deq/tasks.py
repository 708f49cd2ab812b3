"""Two tasks with their nets: handwritten digits, and the last mark of a sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skipguide.vision.skip_deq.network import DEQInfo, SkipDEQ

MARKS = 4


@dataclass(frozen=True)
class Examples:
    """Inputs and classes; for sequences also how far back the answer lies."""

    inputs: Tensor
    classes: Tensor
    distance: Tensor | None = None


def digits() -> tuple[Examples, Examples, Examples]:
    """Scikit-learn's 1797 digits of 8x8 pixels: 1047 for training, 300 for validation, 450 for testing."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    inputs = torch.from_numpy(data.data).float()[order] / 16 - 0.3
    classes = torch.from_numpy(data.target).long()[order]
    parts = [(0, 1047), (1047, 1347), (1347, 1797)]
    train, validation, test = (Examples(inputs[a:b], classes[a:b]) for a, b in parts)
    return train, validation, test


def sequences(count: int, length: int, density: float, seed: int) -> Examples:
    """At every place: which mark was seen last? A mark is one of four and rare; in between there is nothing.

    Inputs `[count, length, 5]` are one-hot with "nothing" last, classes `[count, length]`; the first place always
    has a mark.
    """
    generator = torch.Generator().manual_seed(seed)
    marks = torch.randint(MARKS, (count, length), generator=generator)
    there = torch.rand(count, length, generator=generator) < density
    there[:, 0] = True
    place = torch.arange(length).expand(count, length)
    last = torch.where(there, place, 0).cummax(1).values
    inputs = nn.functional.one_hot(torch.where(there, marks, MARKS), MARKS + 1).float()
    return Examples(inputs, marks.gather(1, last), place - last)


class DigitsCell(nn.Module):
    """f(z, x) = tanh(B tanh(A z + U x) + z / 2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.u, self.b = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.b(torch.tanh(self.a(z) + self.u(x))) + z / 2)


class MemoryCell(nn.Module):
    """What a place says given its neighbour to the left: a gate between keeping and writing.

    All places update at once, so that news travels one place per evaluation: the equilibrium is what a recurrent
    network would find step by step, and it is unique.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.write = nn.Linear(2 * width, width), nn.Linear(2 * width, width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        left = nn.functional.pad(z[:, :-1], (0, 0, 1, 0))
        both = torch.cat([left, x], dim=-1)
        gate = torch.sigmoid(self.gate(both) + 1.0)
        return gate * left + (1 - gate) * torch.tanh(self.write(both))


class WindowGuess(nn.Module):
    """Z0 from the last `window` places alone, `[N, length, width]` both ways."""

    def __init__(self, width: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.conv = nn.Conv1d(width, 2 * width, window)
        self.out = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        seen = nn.functional.pad(x.mT, (self.window - 1, 0))
        return torch.tanh(self.out(torch.relu(self.conv(seen)).mT))


class Net(nn.Module):
    """An encoder, an equilibrium and a classifier."""

    def __init__(self, encoder: nn.Module, deq: SkipDEQ, classifier: nn.Module) -> None:
        super().__init__()
        self.encoder, self.deq, self.classifier = encoder, deq, classifier

    def forward(self, inputs: Tensor, unroll: int = 0) -> tuple[Tensor, Tensor, DEQInfo]:
        """Logits, the equilibrium and how the solve went."""
        x = self.encoder(inputs)
        z, info = self.deq.unroll(x, unroll) if unroll else self.deq(x)
        return self.classifier(z), z, info


def build(task: str, variant: str, tol: float, budget: int, seed: int, window: int = 8) -> Net:
    """An untrained net; "guess" is the guess trained as a net of its own (a budget of 0)."""
    torch.manual_seed(seed)
    width = 64 if task == "digits" else 16
    inputs, outputs = (64, 10) if task == "digits" else (MARKS + 1, MARKS)
    encoder: nn.Module = nn.Linear(inputs, width)
    encoder = nn.Sequential(encoder, nn.ReLU()) if task == "digits" else encoder
    cell: nn.Module = DigitsCell(width) if task == "digits" else MemoryCell(width)
    guess: nn.Module
    if task == "digits":
        guess = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh())
    else:
        guess = WindowGuess(width, window)
    init = None if variant.startswith("plain") else "skip_reg" if variant.startswith("Skip-Reg") else guess
    solver = "anderson" if task == "digits" else "picard"
    deq = SkipDEQ(cell, init, solver, tol, 0 if variant == "guess alone" else budget, backward_budget=budget)
    return Net(encoder, deq, nn.Linear(width, outputs))
