"""Cell nuclei made up by rules: pictures with their masks, for trying segmentation without a data set.

Nuclei touch, overlap and have a texture; the light is uneven, and rings, fibres and blurred nuclei from another plane
look like nuclei and are none. Bright on dark (fluorescence) or dark on light (a stained section).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from skipguide.errors import SkipError

Style = Literal["fluorescence", "stained"]
STYLES: tuple[Style, ...] = ("fluorescence", "stained")
Floats = NDArray[np.float64]


def generate_nuclei(
    seed: int, size: int = 64, style: Style | None = None, crowd: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Make up a picture of nuclei; equal arguments give equal pictures.

    Args:
        seed: which one.
        size: side in pixels, at least 16. Nuclei keep their size of some 5 to 14 pixels; a larger picture has more.
        style: "fluorescence" or "stained"; by chance if None.
        crowd: least and most nuclei; by the size if None.

    Returns:
        The picture, floats `[3, size, size]` in 0..1, and its mask, floats `[1, size, size]`, 1 inside a nucleus.

    Raises:
        SkipError: for arguments out of range.

    Example:
        >>> image, mask = generate_nuclei(0)
        >>> image.shape, mask.shape, 0.02 < mask.mean().item() < 0.7
        (torch.Size([3, 64, 64]), torch.Size([1, 64, 64]), True)
    """
    if size < 16:
        raise SkipError(f"expected a size of at least 16 pixels; got {size}")
    if style is not None and style not in STYLES:
        raise SkipError(f"expected a style out of {list(STYLES)}; got {style!r}")
    rng = np.random.default_rng(seed)
    chosen = style or STYLES[int(rng.integers(len(STYLES)))]
    tiles = (size / 64) ** 2
    least, most = crowd or (max(1, round(6 * tiles)), max(2, round(16 * tiles)))
    if not 1 <= least <= most:
        raise SkipError(f"expected 1 or more nuclei, least and most; got {crowd}")
    canvas = np.zeros((size, size))
    for _ in range(rng.poisson(3 * tiles)):
        canvas = np.maximum(canvas, _distractor(rng, size))
    mask = np.zeros((size, size), dtype=bool)
    typical = float(rng.choice([3.2, 4.5, 6.2]))
    placed: list[tuple[float, float, float]] = []
    for _ in range(int(rng.integers(least, most + 1))):
        radius = typical * float(rng.uniform(0.75, 1.3))
        row, column = _place(rng, size, radius, placed)
        placed.append((row, column, radius))
        depth, inside = _nucleus(rng, size, row, column, radius)
        level = rng.uniform(0.45, 0.95) * (1 + 0.35 * _cloud(rng, size, 12 * size / 64))
        # Where two overlap the light of both shows.
        canvas = canvas * (1 - 0.75 * depth) + level * depth
        mask |= inside
    light = _light(rng, size)
    image = _colour(rng, canvas, light, chosen)
    image = image + rng.normal(0, rng.uniform(0.02, 0.06), image.shape)
    return (
        torch.from_numpy(image.clip(0, 1)).float(),
        torch.from_numpy(mask[None]).float(),
    )


def _place(
    rng: np.random.Generator, size: int, radius: float, placed: list[tuple[float, float, float]]
) -> tuple[float, float]:
    """Half of the nuclei touch or overlap an earlier one."""
    if placed and rng.random() < 0.5:
        row, column, other = placed[int(rng.integers(len(placed)))]
        angle, far = rng.uniform(0, 2 * np.pi), (radius + other) * rng.uniform(0.75, 1.1)
        return row + far * float(np.sin(angle)), column + far * float(np.cos(angle))
    return float(rng.uniform(0, size)), float(rng.uniform(0, size))


def _polar(size: int, row: float, column: float) -> tuple[Floats, Floats]:
    y, x = np.mgrid[:size, :size] + 0.5
    return np.hypot(y - row, x - column), np.arctan2(y - row, x - column)


def _nucleus(
    rng: np.random.Generator, size: int, row: float, column: float, radius: float
) -> tuple[Floats, NDArray[np.bool_]]:
    """How much of a nucleus covers each pixel (0..1), and whether the pixel lies inside."""
    far, angle = _polar(size, row, column)
    stretch, turn = rng.uniform(0, 0.25), rng.uniform(0, np.pi)
    edge = radius * (1 + stretch * np.cos(2 * (angle - turn)))
    for wave in (3, 4, 5):
        edge = edge + radius * rng.normal(0, 0.05) * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
    return 1 / (1 + np.exp(np.clip((far - edge) / rng.uniform(0.35, 0.8), -40, 40))), far < edge


def _distractor(rng: np.random.Generator, size: int) -> Floats:
    """A ring, a fibre, or a nucleus out of focus."""
    row, column = rng.uniform(0, size, 2)
    far, _ = _polar(size, float(row), float(column))
    kind, level = rng.integers(3), rng.uniform(0.3, 0.8)
    if kind == 0:
        return np.asarray(level * np.exp(-(((far - rng.uniform(2.5, 7)) / rng.uniform(0.8, 1.4)) ** 2)))
    if kind == 1:
        y, x = np.mgrid[:size, :size] - 0.5 * size
        turn = rng.uniform(0, np.pi)
        along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
        wave = (
            rng.uniform(1, 5) * np.sin(along / rng.uniform(6, 14) + rng.uniform(0, 6)) + rng.uniform(-0.4, 0.4) * size
        )
        return np.asarray(level * np.exp(-(((across - wave) / rng.uniform(0.8, 1.6)) ** 2)))
    return np.asarray(0.8 * level * np.exp(-((far / rng.uniform(4, 9)) ** 2)))


def _cloud(rng: np.random.Generator, size: int, cells: float) -> Floats:
    """Smooth noise of variance about one, with so many bumps along a side."""
    count = max(2, round(cells))
    rough = torch.from_numpy(rng.normal(0, 1, (1, 1, count, count)))
    smooth = F.interpolate(rough, size=(size, size), mode="bicubic", align_corners=True)[0, 0].numpy()
    return np.asarray(smooth / max(float(smooth.std()), 1e-6))


def _light(rng: np.random.Generator, size: int) -> Floats:
    y, x = np.mgrid[:size, :size] / max(size - 1, 1) - 0.5
    slope = rng.uniform(-0.6, 0.6, 2)
    return np.asarray((1 + slope[0] * y + slope[1] * x - rng.uniform(0, 0.8) * (x**2 + y**2)).clip(0.3, 1.5))


def _colour(rng: np.random.Generator, canvas: Floats, light: Floats, style: Style) -> Floats:
    """`[3, size, size]`: the light that nuclei send out, or the light that they leave."""
    haze = 0.12 * (1 + 0.4 * _cloud(rng, len(canvas), 5 * len(canvas) / 64))
    if style == "fluorescence":
        tint = np.array([0.35, 0.55, 1.0]) + rng.uniform(-0.15, 0.15, 3)
        return np.asarray(tint[:, None, None].clip(0, 1) * (haze + 0.85 * canvas) * light)
    paper, ink = np.array([0.95, 0.83, 0.90]), np.array([0.62, 0.72, 0.36]) + rng.uniform(-0.08, 0.08, 3)
    return np.asarray(paper[:, None, None] * (1 - ink[:, None, None] * (haze + 0.9 * canvas)) * (0.55 + 0.45 * light))
