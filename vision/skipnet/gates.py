"""The gates of SkipNet (arXiv 1711.09485, section 3.3): what enters a block decides whether it runs.

A gate gives the logit of "run": the probability is its sigmoid, and the block runs where that exceeds one half.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from skipguide.config import as_number, as_whole, is_one_of
from skipguide.errors import SkipError

GateKind = Literal["rnn", "ff1", "ff2"]
KINDS: tuple[str, ...] = get_args(GateKind)


class Gates(nn.Module):
    """One decision per gated block; `forward(place, x, state)` gives the logits `[B]` and the state for the next."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = tuple(channels)

    def __len__(self) -> int:
        return len(self.channels)

    def forward(self, place: int, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logits of running the block that `x` is about to enter."""
        raise NotImplementedError

    def last_layers(self) -> list[nn.Module]:
        """The layers whose output is the logits (or their difference): scaling them sharpens the decisions."""
        raise NotImplementedError

    @torch.no_grad()
    def sharpen(self, factor: float) -> None:
        """Multiply every logit, so that sampled decisions come closer to thresholded ones.

        The published ImageNet script does this by 20 before its reinforcement stage.

        Raises:
            SkipError: for a factor that is not positive.
        """
        if not as_number("factor", factor) > 0:
            raise SkipError(f"expected a positive factor; got {factor!r}")
        for layer in self.last_layers():
            for parameter in layer.parameters():
                parameter.mul_(factor)

    @torch.no_grad()
    def open_by(self, logit: float) -> None:
        """Set the biases of the last layers, so that decisions start near one value: positive runs every block."""
        for layer in self.last_layers():
            if isinstance(layer, nn.Linear):
                layer.bias.zero_()
                layer.bias[-1] = logit


class RecurrentGates(Gates):
    """One LSTM over the depth of the network, shared by all blocks; each has its own embedding of pooled features.

    Args:
        channels: of the stream that enters every gated block.
        embed: size of the embedding.
        hidden: size of the LSTM's state; it starts at zero for every forward pass.
    """

    def __init__(self, channels: Sequence[int], embed: int = 10, hidden: int = 10) -> None:
        super().__init__(channels)
        self.embed = nn.ModuleList(nn.Linear(width, embed) for width in channels)
        self.rnn = nn.LSTMCell(embed, hidden)
        self.proj = nn.Linear(hidden, 1)

    def forward(self, place: int, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One step of the LSTM; see the class."""
        hidden, cell = self.rnn(self.embed[place](_pooled(x)), state)
        return self.proj(hidden)[:, 0], (hidden, cell)

    def last_layers(self) -> list[nn.Module]:
        """The projection."""
        return [self.proj]


class FeedForwardGates(Gates):
    """One small convolutional network per block: FFGate-I (max pool, two 3x3) or FFGate-II (one strided 3x3).

    Args:
        channels: of the stream that enters every gated block.
        pool: True for FFGate-I.
    """

    def __init__(self, channels: Sequence[int], pool: bool) -> None:
        super().__init__(channels)
        self.pool = pool
        self.gates = nn.ModuleList(_FeedForwardGate(width, pool) for width in channels)

    def forward(self, place: int, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """The gate of one block; there is no state."""
        smallest = 2 if self.pool else 1
        if x.ndim != 4 or min(x.shape[-2:]) < smallest:
            raise SkipError(
                f"a convolutional gate needs maps [B, C, H, W] of at least {smallest} pixels a side; got "
                f'{list(x.shape)}: use gate="rnn"'
            )
        skip, run = self.gates[place](x).unbind(1)
        return run - skip, None

    def last_layers(self) -> list[nn.Module]:
        """The heads."""
        return [gate.head for gate in self.gates if isinstance(gate, _FeedForwardGate)]


class _FeedForwardGate(nn.Module):
    def __init__(self, width: int, pool: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if pool else []
        for stride in (1, 2) if pool else (2,):
            conv = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x).mean((2, 3)))
        return out


def _pooled(x: Tensor) -> Tensor:
    """Mean over everything but the batch and the channels: maps `[B, C, H, W]`, tokens `[B, T, C]`, or `[B, C]`."""
    return x.mean((2, 3)) if x.ndim == 4 else x.flatten(1, -2).mean(1) if x.ndim > 2 else x


def build_gates(kind: str, channels: Sequence[int], embed: int = 10, hidden: int = 10) -> Gates:
    """The gates of a kind: `"rnn"`, `"ff1"` or `"ff2"`.

    Raises:
        SkipError: for another kind, or sizes below 1.
    """
    if not is_one_of(kind, KINDS):
        raise SkipError(f"unknown gate {kind!r}; expected one of {', '.join(KINDS)}")
    if kind != "rnn":
        return FeedForwardGates(channels, pool=kind == "ff1")
    return RecurrentGates(channels, as_whole("embed", embed), as_whole("hidden", hidden))
