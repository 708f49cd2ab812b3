"""Rows: run a block for the batch rows that stay, and only for those."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Branch = Callable[[Tensor], Tensor]

# Bytes of a row from which a slice of it, about 1.5 microseconds of Python, is worth its copy.
_WORTH_A_SLICE = 16384


def run_rows(
    block: Branch, x: Tensor, index: Tensor | list[int], shortcut: Branch | None = None, own: bool = False
) -> Tensor:
    """`where(d, block(x), shortcut(x))` per row, without computing what `where` would throw away.

    All rows stay: the block is called directly. None: it is not called. Else the rows are gathered, run and put back.

    Args:
        block: the whole residual block, `[n, ...] -> [n, ...]`, rows independent of each other.
        x: the block's input, `[B, ...]`; it is not written to, unless it is ours.
        index: numbers of the rows that run, ascending and without repeats: a list, or `[n]` on x's device.
        shortcut: what the other rows get; None is the identity.
        own: x is read nowhere else, now or later, so it may be written to: where its other rows stay, it is the output.

    Returns:
        `[B, ...]`; differentiable.

    Example:
        >>> x = torch.arange(3.0)[:, None]
        >>> run_rows(lambda rows: 10 * rows, x, torch.tensor([2])).flatten().tolist()
        [0.0, 1.0, 20.0]
    """
    count, rows = len(index), x.shape[0]
    if count == rows:
        return block(x)
    if count == 0:
        return x if shortcut is None else shortcut(x)
    if x.is_cpu and x.nbytes >= rows * _WORTH_A_SLICE:
        numbers = index.tolist() if isinstance(index, Tensor) else index
        if own and shortcut is None:
            return _in_place(block, x, numbers)
        return _in_slices(block, x, numbers, shortcut)
    if not isinstance(index, Tensor):
        index = torch.tensor(index).to(x.device, non_blocking=True)  # without a second wait for the device
    ran = block(x.index_select(0, index))
    if shortcut is None:
        if ran.dtype != x.dtype:  # autocast may let the block return another
            x, own = x.to(ran.dtype), True
        return (x if own else x.clone()).index_copy_(0, index, ran)
    stays = torch.zeros(rows, dtype=torch.bool, device=x.device).index_fill_(0, index, True)
    left = stays.to(torch.uint8).argsort(stable=True)[: rows - count]  # nonzero would wait for the device
    rest = shortcut(x.index_select(0, left)).to(ran.dtype)
    # every row's place among those that ran; the others' is overwritten
    places = (stays.cumsum(0) - 1).clamp(min=0)
    return ran.index_select(0, places).index_copy_(0, left, rest)


def _in_slices(block: Branch, x: Tensor, numbers: list[int], shortcut: Branch | None) -> Tensor:
    """`run_rows` by slices, on the CPU: every row is copied once, in half of the time, and channels-last stays so."""
    stretches = _stretches(numbers)
    ends = [0, *(end for stretch in stretches for end in stretch), x.shape[0]]
    sizes = [stop - start for start, stop in pairwise(ends)]  # those that rest and those that run, by turns
    first, last = int(sizes[0] == 0), len(sizes) - (sizes[-1] == 0)
    sizes = sizes[first:last]
    runs, rest = slice(1 - first, None, 2), slice(first, None, 2)
    pieces = list(x.split_with_sizes(sizes))
    ran = block(torch.cat(pieces[runs]))
    if shortcut is not None:
        pieces[rest] = shortcut(torch.cat(pieces[rest])).split_with_sizes(sizes[rest])
    if pieces[first].dtype != ran.dtype:  # autocast may let the block return another
        pieces[rest] = [piece.to(ran.dtype) for piece in pieces[rest]]
    pieces[runs] = ran.split_with_sizes(sizes[runs])
    return torch.cat(pieces)


def _in_place(block: Branch, x: Tensor, numbers: list[int]) -> Tensor:
    """`run_rows` where x may be written to, on the CPU: only the rows that run are copied."""
    stretches = _stretches(numbers)
    pieces = [x[start:stop] for start, stop in stretches]
    ran = block(torch.cat(pieces))
    if ran.dtype != x.dtype:
        x = x.to(ran.dtype)
        pieces = [x[start:stop] for start, stop in stretches]
    for piece, new in zip(pieces, ran.split_with_sizes([stop - start for start, stop in stretches]), strict=True):
        piece.copy_(new)
    return x


def _stretches(numbers: list[int]) -> list[tuple[int, int]]:
    """Where the rows that run begin and end, neighbours together."""
    found: list[tuple[int, int]] = []
    start = end = numbers[0]
    for row in numbers:
        if row != end:
            found.append((start, end))
            start = row
        end = row + 1
    return [*found, (start, end)]
