"""Rows: run a block for the batch rows that stay, and only for those."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Branch = Callable[[Tensor], Tensor]

# Bytes of a row from which a slice of it, about 1.5 microseconds of Python, is worth its copy.
_WORTH_A_SLICE = 16384


def run_rows(block: Branch, x: Tensor, index: Tensor | list[int], shortcut: Branch | None = None) -> Tensor:
    """`where(d, block(x), shortcut(x))` per row, without computing what `where` would throw away.

    All rows stay: the block is called directly. None: it is not called. Else the rows are gathered, run and put back.

    Args:
        block: the whole residual block, `[n, ...] -> [n, ...]`, rows independent of each other.
        x: the block's input, `[B, ...]`; it is not written to.
        index: numbers of the rows that run, ascending and without repeats: a list, or `[n]` on x's device.
        shortcut: what the other rows get; None is the identity.

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
    if x.device.type == "cpu" and x.numel() * x.element_size() >= rows * _WORTH_A_SLICE:
        return _in_slices(block, x, index.tolist() if isinstance(index, Tensor) else index, shortcut)
    if not isinstance(index, Tensor):
        index = torch.tensor(index, device=x.device)
    ran = block(x.index_select(0, index))
    if shortcut is None:
        out = x.clone() if ran.dtype == x.dtype else x.to(ran.dtype)  # autocast may let the block return another
        return out.index_copy_(0, index, ran)
    stays = torch.zeros(rows, dtype=torch.bool, device=x.device).index_fill_(0, index, True)
    left = (~stays).nonzero()[:, 0]
    rest = shortcut(x.index_select(0, left)).to(ran.dtype)
    # every row's place among those that ran; the others' is overwritten
    places = (stays.cumsum(0) - 1).clamp(min=0)
    return ran.index_select(0, places).index_copy_(0, left, rest)


def _in_slices(block: Branch, x: Tensor, numbers: list[int], shortcut: Branch | None) -> Tensor:
    """The same by slices on the CPU: every row is copied once, in half of the time, and channels-last stays so."""
    ran = block(torch.cat([x[row : row + 1] for row in numbers]))
    if shortcut is None:
        rest, moved = x, 0
    else:
        left = sorted(set(range(x.shape[0])).difference(numbers))
        rest, moved = shortcut(torch.cat([x[row : row + 1] for row in left])), 1
    if rest.dtype != ran.dtype:  # autocast may let the block return another
        rest = rest.to(ran.dtype)
    pieces, start = [], 0  # of the rest's rows
    for place, row in enumerate(numbers):
        stop = row - place * moved
        if stop > start:
            pieces.append(rest[start:stop])
        pieces.append(ran[place : place + 1])
        start = stop + 1 - moved
    if start < rest.shape[0]:
        pieces.append(rest[start:])
    return torch.cat(pieces)
