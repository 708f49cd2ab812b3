"""Attention maps: how the attention of the image's tokens is changed. Pure functions of one call of the attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from skipguide.errors import SkipError
from skipguide.perturbations.attention import SelfAttention
from skipguide.perturbations.grid import Grid

CROP = 5 / 8  # of a side: the crops that arXiv 2411.10257 publishes, 20 of 32 and 40 of 64


def identity(attention: SelfAttention, grid: Grid) -> Tensor:
    """The identity map: every token keeps its own value (STG-A, arXiv 2411.18664; PAG, arXiv 2403.17377)."""
    return attention.values()


class Blur:
    """A Gaussian blur of the attention scores over the grid of their queries (SEG, arXiv 2408.00760, section 3.2).

    Scores are linear in the queries, so the queries are blurred, as attention gets them: after norms and rotations. The
    kernel is cut at three sigma, or at the side of the grid, and the grid is reflected at its borders, as in the
    authors' code; time is blurred like height and width.

    Args:
        sigma: standard deviation in tokens; None is infinity, where every query is their mean.
    """

    __slots__ = ("sigma",)

    def __init__(self, sigma: float | None) -> None:
        self.sigma = sigma

    def __call__(self, attention: SelfAttention, grid: Grid) -> Tensor:
        """Attend with the blurred queries."""
        rows = attention.image
        query, mask = attention.query[..., rows, :], attention.mask
        if self.sigma is None:
            mean = query.mean(dim=-2, keepdim=True)
            if mask is not None and mask.shape[-2] > 1:  # rows of a mask are not alike
                return attention.attend(rows, mean.expand_as(query))
            out = attention.attend(rows, mean)
            return out.expand(*out.shape[:-2], query.shape[-2], out.shape[-1])
        lattice = query.reshape(*query.shape[:-2], *grid, query.shape[-1])
        for axis, length in zip((-4, -3, -2), grid, strict=True):
            if length > 1:
                weights = blur_matrix(length, self.sigma).to(query)
                lattice = torch.einsum("ij,...jc->...ic", weights, lattice.movedim(axis, -2)).movedim(-2, axis)
        return attention.attend(rows, lattice.flatten(-4, -2))


def blur_matrix(length: int, sigma: float) -> Tensor:
    """The blur of a line of tokens as a matrix, in float64: each row the weights of a token's neighbours.

    Example:
        >>> blur_matrix(3, 1.0).sum(dim=1)
        tensor([1., 1., 1.], dtype=torch.float64)
    """
    size = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
    half = min(size, length + 1 - length % 2) // 2
    offsets = torch.arange(-half, half + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    places = torch.arange(length)[:, None] + torch.arange(-half, half + 1)
    places = places.abs()
    places = torch.where(places < length, places, 2 * (length - 1) - places)
    return torch.zeros(length, length, dtype=torch.float64).scatter_add_(1, places, kernel.expand(length, -1))


class Windows:
    """Attention within windows of the grid; text is seen from everywhere (after SWG, arXiv 2411.10257).

    The windows cover the grid, all of one size, the fewest that do, evenly placed; where they overlap, a token gets the
    mean. That is how the authors place their crops. They run the whole model on each crop; this restricts single
    blocks, and so starts in the middle of the model. What they mask (M-SWG) is the guidance, outside the overlaps, and
    is nothing that a block does.

    Args:
        time: whether the windows are short in time (and have whole frames), or else small in space (with all frames).
        size: tokens along time, or along height and width (one number, or two); None is 5/8 of the side.
        part: for errors.
    """

    __slots__ = ("part", "size", "time")

    def __init__(self, time: bool, size: int | tuple[int, int] | None, part: str) -> None:
        self.time = time
        self.size = size
        self.part = part

    def __call__(self, attention: SelfAttention, grid: Grid) -> Tensor:
        """Attend within each window, and take the mean where several give something."""
        image, length = attention.image, attention.query.shape[-2]
        device = attention.query.device
        before = torch.arange(0, image.start, device=device)
        after = torch.arange(image.stop, length, device=device)
        out: Tensor | None = None
        count = torch.zeros(image.stop - image.start, device=device)
        places = self.places(grid)
        for place in places:
            window = place.to(device)
            made = attention.attend(window + image.start, keys=torch.cat([before, window + image.start, after]))
            if out is None:
                out = made.new_zeros((*made.shape[:-2], image.stop - image.start, made.shape[-1]))
            out[..., window, :] += made
            count[window] += 1
        assert out is not None
        overlap = sum(map(len, places)) > len(count)
        return out / count.to(out)[:, None] if overlap else out

    def places(self, grid: Grid) -> list[Tensor]:
        """For each window the numbers of its tokens.

        Raises:
            SkipError: if one window is the whole grid, so that nothing would be restricted.
        """
        sides = list(grid)
        wanted: tuple[int | None, ...]
        if self.time:
            assert not isinstance(self.size, tuple)
            wanted = (self.size, sides[1], sides[2])
        else:
            wanted = (sides[0], *self.size) if isinstance(self.size, tuple) else (sides[0], self.size, self.size)
        sizes = [min(side, _crop(side) if size is None else size) for side, size in zip(sides, wanted, strict=True)]
        if sizes == sides:
            raise SkipError(
                f"part={self.part!r} with window={self.size} leaves one window over all {' x '.join(map(str, sides))} "
                f"tokens (frames, height, width), so nothing is restricted: take a smaller one"
            )
        numbers = torch.arange(math.prod(sides)).reshape(sides)
        starts = [_starts(side, size) for side, size in zip(sides, sizes, strict=True)]
        return [
            numbers[t : t + sizes[0], y : y + sizes[1], x : x + sizes[2]].flatten()
            for t in starts[0]
            for y in starts[1]
            for x in starts[2]
        ]


def _crop(side: int) -> int:
    return max(1, min(side - 1, math.ceil(CROP * side)))


def _starts(side: int, size: int) -> list[int]:
    """Where the fewest windows of a size begin that cover a side, evenly placed.

    Example:
        >>> _starts(32, 20), _starts(6, 2)
        ([0, 12], [0, 2, 4])
    """
    count = math.ceil(side / size)
    return [i * (side - size) // max(count - 1, 1) for i in range(count)]
