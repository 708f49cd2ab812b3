"""Tokens that change places before a block: all of them at random, or the pairs that are most unlike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skipguide.active import ActivePlan, Call
from skipguide.arguments import Arguments
from skipguide.blocks import Block
from skipguide.errors import SkipError

AT_ONCE = 1 << 24  # similarities that are held at a time


class MovedTokens:
    """A block gets the tokens of its first stream (the image's) in other places; the text's stay where they are.

    Args:
        block: the block.
        part: for errors.
        strength: how far the tokens go towards those that take their places.
        move: `[B, tokens, channels]` to the same with its tokens (or channels) moved.
    """

    __slots__ = ("arguments", "move", "name", "part", "stream", "strength")

    def __init__(self, block: Block, part: str, strength: float, move: Callable[[Tensor], Tensor]) -> None:
        self.arguments = Arguments(block.module)
        self.stream = block.spec.streams[0]
        self.arguments.expect(block.module, block.name, (self.stream,))
        self.name = block.name
        self.part = part
        self.strength = strength
        self.move = move

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block on the moved tokens."""
        stream = self.arguments.get(self.stream, args, kwargs)
        if not isinstance(stream, Tensor) or stream.dim() != 3:
            shape = list(stream.shape) if isinstance(stream, Tensor) else type(stream).__name__
            raise SkipError(
                f"{self.part} expected {self.stream} of {self.name} as [batch, tokens, channels]; got {shape}"
            )
        moved = self.move(stream)
        if self.strength < 1:
            moved = torch.lerp(stream, moved, self.strength)
        args, kwargs = self.arguments.put({self.stream: moved}, args, kwargs)
        return call(*args, **kwargs)


class Shuffle:
    """All tokens in a random order, the same in every row (TPG, arXiv 2506.10036: what is moved keeps its norm).

    The order depends on the seed, the block and the number of tokens alone, and no generator is asked: it is the same
    on every device, in every branch and for every selection of rows.

    Args:
        seed: of the order.
        layer: number of the block.
    """

    __slots__ = ("layer", "seed")

    def __init__(self, seed: int, layer: int) -> None:
        self.seed = seed
        self.layer = layer

    def __call__(self, tokens: Tensor) -> Tensor:
        """The tokens in their new order."""
        return tokens.index_select(1, shuffled(tokens.shape[1], self.seed, self.layer, tokens.device))


def shuffled(count: int, seed: int, layer: int, device: torch.device | None = None) -> Tensor:
    """The order of a shuffle: that of numbers which the mixing of SplitMix64 makes, without two alike.

    Of a few tokens an order may happen to leave each where it is, which would be no shuffle: then the next is taken.

    Example:
        >>> shuffled(5, seed=0, layer=3).tolist()
        [4, 0, 3, 2, 1]
    """
    start = _mixed((_mixed(seed) + layer) % _WORD)
    while 1 < count <= _FEW and _stays(count, start):
        start = _mixed((start + _STEP) % _WORD)
    numbers = torch.arange(1, count + 1, device=device) * _signed(_STEP) + _signed(start)
    for shift, factor in _ROUNDS:  # whole numbers of torch wrap around, and shift their sign in
        numbers = (numbers ^ ((numbers >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return (numbers ^ ((numbers >> 31) & ((1 << 33) - 1))).argsort()


def _stays(count: int, start: int) -> bool:
    """Whether the order that begins there leaves every token in its place."""
    numbers = [_signed(_mixed((start + k * _STEP) % _WORD)) for k in range(1, count + 1)]
    return numbers == sorted(numbers)


_FEW = 8  # tokens: of more, one order in 300,000 at most stays
_WORD = 1 << 64
_STEP = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def _mixed(number: int) -> int:
    for shift, factor in _ROUNDS:
        number = (number ^ (number >> shift)) * factor % _WORD
    return number ^ (number >> 31)


def _signed(number: int) -> int:
    return number - _WORD if number >= _WORD // 2 else number


class Swap:
    """The most unlike pairs change places: of tokens, of channels, or of both, tokens first (SSG, arXiv 2604.08048).

    Of `ratio` times as many pairs as there are tokens (channels), by cosine similarity from the least, each is swapped
    unless one of the two has changed places already. (In the authors' code such pairs overwrite each other, in an order
    that a GPU does not fix.)

    Args:
        ratio: pairs per token (channel).
        over: `"space"`, `"channels"` or `"both"`.
    """

    __slots__ = ("over", "ratio")

    def __init__(self, ratio: float, over: str) -> None:
        self.ratio = ratio
        self.over = over

    def __call__(self, tokens: Tensor) -> Tensor:
        """The tokens after the swaps."""
        if self.over != "channels":
            tokens = self._swapped(tokens)
        if self.over != "space":
            tokens = self._swapped(tokens.transpose(1, 2)).transpose(1, 2).contiguous()
        return tokens

    def _swapped(self, things: Tensor) -> Tensor:
        # row by row: which pairs they are does not depend on the other rows of the batch
        return torch.stack([row.index_select(0, swap_order(row, self.ratio).to(row.device)) for row in things])


def swap_order(things: Tensor, ratio: float) -> Tensor:
    """For each place, which of `[things, features]` comes there.

    Example:
        >>> import torch
        >>> swap_order(torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.1], [0.8, 0.2]]), ratio=0.25)
        tensor([2, 1, 0, 3])
    """
    order = list(range(len(things)))
    for a, b in _most_unlike(things, max(1, int(len(things) * ratio))):
        if order[a] == a and order[b] == b:
            order[a], order[b] = b, a
    return torch.tensor(order)


def _most_unlike(things: Tensor, count: int) -> list[tuple[int, int]]:
    """The pairs with the least cosine similarity, from the least on."""
    length = len(things)
    units = F.normalize(things.float(), dim=1)
    best = units.new_empty(0)
    where = torch.empty(0, dtype=torch.long, device=units.device)
    chunk = max(1, AT_ONCE // max(length, 1))
    columns = torch.arange(length, device=units.device)
    for first in range(0, length, chunk):
        part = units[first : first + chunk]
        similar = part @ units.T
        similar = similar.masked_fill(columns <= columns[first : first + len(part), None], float("inf")).flatten()
        best, where = (
            torch.cat([best, similar]),
            torch.cat([where, first * length + torch.arange(len(similar)).to(where)]),
        )
        best, places = best.topk(min(count, len(best)), largest=False)
        where = where[places]
    found = where[torch.isfinite(best)].tolist()
    return [divmod(place, length) for place in found]
