"""Hidden positions take the mean of their known neighbours, ring by ring (arXiv 2211.14646, section 3).

Round d writes the positions at Chebyshev distance d from the visible ones and never revises them. So the weights
depend on the mask alone and are computed once, and a window of k needs at most k - 1 rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5  # of the published code's division by the number of known neighbours
PART = 2**21  # bytes that are filled at a time on the CPU: they stay in its cache between the additions


def box_sum(x: Tensor) -> Tensor:
    """Sums over 3x3 windows of `[N, C, H, W]`, zero outside."""
    if x.is_cuda or (x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()):
        return F.avg_pool2d(x, 3, 1, 1) * 9 if not x.is_cuda else F.avg_pool2d(x, 3, 1, 1, divisor_override=1)
    rows = x.clone()  # on the CPU four shifted additions are several times faster than a pooling of [N, C, H, W]
    rows[..., 1:] += x[..., :-1]
    rows[..., :-1] += x[..., 1:]
    out = rows.clone()
    out[..., 1:, :] += rows[..., :-1, :]
    out[..., :-1, :] += rows[..., 1:, :]
    return out


def fill_weights(mask: Tensor, rounds: int) -> list[Tensor]:
    """What each round multiplies the sums over 3x3 windows with.

    Args:
        mask: bool `[R, 1, H, W]`, True = visible.
        rounds: how many.

    Returns:
        One `[R, 1, H, W]` per round: 1 / (known neighbours) where the round writes, else 0.
    """
    weights = []
    small = torch.float32 if mask.is_cuda else torch.uint8  # bytes are faster to add, and CUDA's pooling has none
    for _ in range(rounds):
        count = box_sum(mask.to(small))
        known = count > 0
        weights.append((known > mask) / (count + EPS))
        mask = known
    return weights


def fill(x: Tensor, weights: Sequence[Tensor], known: Tensor | None = None) -> Tensor:
    """Fill from the known positions.

    Args:
        x: `[N, C, H, W]`, 0 where hidden, unless `known` is given.
        weights: of `fill_weights`.
        known: `[R, 1, H, W]` of x's dtype, 1 where visible, to multiply x with first.

    Returns:
        The same with the rings filled. No gradient flows through what is filled, as published.

    Example:
        >>> x = torch.tensor([[[[4.0, 0.0, 0.0]]]])
        >>> fill(x, fill_weights(x > 0, 2)).round(decimals=3)
        tensor([[[[4., 4., 4.]]]])
    """
    learns = torch.is_grad_enabled() and x.requires_grad
    if weights and not learns and _in_parts(x):
        return _fill_in_parts(x, weights, known)
    x = x if known is None else x * known
    if not weights:
        return x
    if not learns:
        return _fill_whole(x, weights)
    with torch.no_grad():
        start = x.detach()
        filled = _fill_in_parts(start, weights, None) if _in_parts(start) else _fill_whole(start, weights)
        filled -= start  # visible positions keep their value, so the difference is the fill alone
    return x + filled


def _fill_whole(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    for weight in weights:
        x = torch.addcmul(x, box_sum(x), weight)
    return x


def _in_parts(x: Tensor) -> bool:
    """Whether an activation is filled part by part: on the CPU, where channels come before positions."""
    return x.device.type == "cpu" and x.ndim == 4 and x.stride(-1) == 1 and x.shape[-1] > 1 and x.numel() > 0


def _fill_in_parts(x: Tensor, weights: Sequence[Tensor], known: Tensor | None) -> Tensor:
    """Some channels of one image at a time: a large activation is read once and written once."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    each = x.shape[-2] * x.shape[-1] * x.element_size()
    if x.numel() * x.element_size() <= PART:
        pieces = [(x, out, slice(None))]
    else:
        step = max(1, PART // each)
        places = [(n, slice(c, c + step)) for n in range(x.shape[0]) for c in range(0, x.shape[1], step)]
        pieces = [(x[n, some], out[n, some], n) for n, some in places]  # type: ignore[misc]
    seen, rows, total = (torch.empty_like(pieces[0][1], memory_format=torch.contiguous_format) for _ in range(3))

    def of(rows_: Tensor, row: slice | int) -> Tensor:
        return rows_[row] if isinstance(row, slice) else rows_[row if rows_.shape[0] > 1 else 0]

    for source, target, row in pieces:
        if len(source) < len(seen):  # the channels that are left
            seen, rows, total = seen[: len(source)], rows[: len(source)], total[: len(source)]
        elif source.shape != seen.shape:
            seen, rows, total = (torch.empty_like(target) for _ in range(3))
        if known is None:
            seen.copy_(source)
        else:
            torch.mul(source, of(known, row), out=seen)
        for number, weight in enumerate(weights):
            _box_sum_into(seen, rows, total)
            torch.addcmul(seen, total, of(weight, row), out=target if number == len(weights) - 1 else seen)
    return out


def fills_in_parts(x: Tensor, *others: Tensor | None) -> bool:
    """Whether `fill_then` is for an activation: a large one on the CPU, where nothing needs a gradient."""
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others))
    return _in_parts(x) and not learns and x.numel() * x.element_size() > PART


def fill_then(x: Tensor, weights: Sequence[Tensor], known: Tensor, then: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """What `then` makes of the filled activation, some channels of one image at a time.

    A depthwise convolution computes so little that writing the filled activation and reading it again costs more.

    Args:
        x: `[N, C, H, W]`.
        weights: of `fill_weights`.
        known: `[R, 1, H, W]` of x's dtype, 1 where visible.
        then: of `[1, c, H, W]`, the channels that the slice says, makes `[1, c, h, w]`.

    Returns:
        `[N, C, h, w]`.
    """
    images, channels, height, width = x.shape
    step = min(channels, max(16, PART // (height * width * x.element_size()) // 16 * 16))
    buffers = torch.empty(3, step, height, width, dtype=x.dtype)
    out: Tensor | None = None
    for n in range(images):
        visible = known[n if known.shape[0] > 1 else 0]
        adding = [weight[n if weight.shape[0] > 1 else 0] for weight in weights]
        for first in range(0, channels, step):
            some = slice(first, min(first + step, channels))
            seen, rows, total = buffers[:, : some.stop - first].unbind(0)
            torch.mul(x[n, some], visible, out=seen)
            for weight in adding:
                _box_sum_into(seen, rows, total)
                seen.addcmul_(total, weight)
            made = then(seen[None], some)
            if out is None:
                out = made.new_empty(images, channels, *made.shape[-2:])
            out[n, some] = made[0]
    assert out is not None
    return out


def _box_sum_into(x: Tensor, rows: Tensor, total: Tensor) -> None:
    """`box_sum` of a contiguous part, into `total`; `rows` is overwritten too."""
    flat, sums = x.view(-1), rows.view(-1)
    # As one line, which is fast; at the ends of the rows it adds neighbours that are none, and they are written anew.
    torch.add(flat[:-1], flat[1:], out=sums[:-1])
    sums[-1:].copy_(flat[-1:])
    sums[1:].add_(flat[:-1])
    torch.add(x[..., 0], x[..., 1], out=rows[..., 0])
    torch.add(x[..., -2], x[..., -1], out=rows[..., -1])
    torch.add(rows[..., :-1, :], rows[..., 1:, :], out=total[..., :-1, :])
    total[..., -1, :].copy_(rows[..., -1, :])
    total[..., 1:, :].add_(rows[..., :-1, :])


def fill_frame(x: Tensor, pads: Sequence[int], weights: Sequence[Tensor]) -> Tensor:
    """Fill around a rectangle of which everything is known: each round computes four lines instead of the map.

    Args:
        x: `[N, C, H, W]`.
        pads: positions to add at the top, bottom, left and right.
        weights: of `fill_weights`, for the padded map.

    Returns:
        The padded map, filled; as `fill` of `x` padded with zeros. No gradient flows through what is filled.

    Example:
        >>> x, known = torch.ones(1, 1, 2, 2), F.pad(torch.ones(1, 1, 2, 2), (2, 0, 1, 2)) > 0
        >>> fill_frame(x, (1, 2, 2, 0), fill_weights(known, 2)).round(decimals=3).unique()
        tensor([1.])
    """
    top, bottom, left, right = pads
    out = F.pad(x, (left, right, top, bottom))
    with torch.no_grad():
        for number, weight in enumerate(weights):
            edges = []
            for axis, before, after in ((-2, top, bottom), (-1, left, right)):
                for inside, step, room in ((before - number, -1, before), (number - after - 1, 1, after)):
                    if room <= number:
                        continue
                    line = out.select(axis, inside)  # the neighbours of the next line that are known
                    total = line.clone(memory_format=torch.contiguous_format)
                    total[..., 1:] += line[..., :-1]
                    total[..., :-1] += line[..., 1:]
                    edges.append((out.select(axis, inside + step), total * weight.select(axis, inside + step)))
            for edge, value in edges:  # only now: a corner belongs to two edges
                edge.copy_(value)
    return out
