"""Scenes: one shape on a textured, cluttered background; the class is the shape, and its pixels are known.

Everything but the shape is random and the same for all classes: colours, textures, sizes, places, turns and the
clutter (strokes and crumbs, drawn before and after the shape). So an explanation is right exactly if it points at the
shape's pixels, which come with each scene.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 64
CLASSES = ("disc", "ring", "square", "frame", "triangle", "cross", "star", "crescent", "hourglass", "bar")
# of the channels of 4096 scenes; the model's preprocessing
MEAN = (0.5, 0.5, 0.5)
STD = (0.25, 0.25, 0.25)


@dataclass(frozen=True)
class Scenes:
    """Some scenes.

    Attributes:
        images: `[N, 3, 64, 64]` bytes.
        labels: `[N]` numbers into `CLASSES`.
        shapes: `[N, 64, 64]` bool, True on the shape's visible pixels.
    """

    images: Tensor
    labels: Tensor
    shapes: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> Scenes:
        return Scenes(self.images[rows], self.labels[rows], self.shapes[rows])


def normalized(images: Tensor) -> Tensor:
    """Bytes (or floats in 0..1) to what the model takes."""
    if not images.is_floating_point():
        images = images.float() / 255
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
    return (images - mean) / std


def make_scenes(count: int, seed: int, batch: int = 512) -> Scenes:
    """Draw `count` scenes; the same seed and count give the same scenes."""
    g = torch.Generator().manual_seed(seed)
    parts = [_draw(min(batch, count - start), g) for start in range(0, count, batch)]
    return Scenes(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _draw(count: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randint(len(CLASSES), (count,), generator=g)
    # colours of background (two) and shape are far enough apart for the shape to be seen
    low, high = _u(g, count, 3, 1, 1), _u(g, count, 3, 1, 1)
    texture = _texture(count, g)
    background = low + (high - low) * 0.6 * texture
    x, y = _grid()
    radius = _u(g, count, 1, 1, low=11.0, high=18.0)
    margin = radius + 1
    cx = margin + (SIZE - 1 - 2 * margin) * _u(g, count, 1, 1)
    cy = margin + (SIZE - 1 - 2 * margin) * _u(g, count, 1, 1)
    turn = _u(g, count, 1, 1, low=-math.pi, high=math.pi)
    dx, dy = (x - cx) / radius, (y - cy) / radius
    u, v = dx * turn.cos() + dy * turn.sin(), -dx * turn.sin() + dy * turn.cos()
    inside = torch.empty(count, SIZE, SIZE, dtype=torch.bool)
    for number, name in enumerate(CLASSES):
        rows = (labels == number).nonzero()[:, 0]
        if len(rows):
            inside[rows] = _SHAPES[name](u[rows], v[rows])
    mean = background.mean((2, 3), keepdim=True)
    colour = _u(g, count, 3, 1, 1)
    # pushed away from the background's mean colour
    away = torch.where(colour > mean, 1.0, -1.0)
    colour = (mean + away * (0.25 + 0.5 * _u(g, count, 3, 1, 1))).clamp(0, 1)
    fill = colour + 0.25 * (_texture(count, g) - 0.5)
    image = _clutter(background, g, strokes=4, crumbs=6)[0]
    image = torch.where(inside[:, None], fill, image)
    image, over = _clutter(image, g, strokes=1, crumbs=2)
    light = 1 + 0.3 * (_u(g, count, 1, 1, 1) - 0.5) + 0.3 * _field(count, 2, g)
    image = image * light + 0.04 * torch.randn(count, 3, SIZE, SIZE, generator=g)
    return (image.clamp(0, 1) * 255).round().byte(), labels, inside & ~over


def _u(g: torch.Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=g)


def _grid() -> tuple[Tensor, Tensor]:
    line = torch.arange(SIZE, dtype=torch.float32)
    return line.view(1, 1, -1), line.view(1, -1, 1)


def _field(count: int, cells: int, g: torch.Generator) -> Tensor:
    """Smooth noise in -0.5..0.5, `cells` waves wide."""
    noise = torch.rand(count, 1, cells + 1, cells + 1, generator=g) - 0.5
    return F.interpolate(noise, (SIZE, SIZE), mode="bilinear", align_corners=True)


def _texture(count: int, g: torch.Generator) -> Tensor:
    """`[count, 1, 64, 64]` in 0..1: stripes, checks, dots or clouds, a kind per image."""
    x, y = _grid()
    turn = _u(g, count, 1, 1, low=-math.pi, high=math.pi)
    wave = 2 * math.pi / _u(g, count, 1, 1, low=4.0, high=14.0)
    a = torch.sin((x * turn.cos() + y * turn.sin()) * wave + _u(g, count, 1, 1, high=6.3))
    b = torch.sin((y * turn.cos() - x * turn.sin()) * wave + _u(g, count, 1, 1, high=6.3))
    clouds = (_field(count, 4, g) + 0.7 * _field(count, 9, g) + 0.5 * _field(count, 20, g))[:, 0]
    kinds = torch.stack([a, (a * b * 3).clamp(-1, 1), ((a + b - 1) * 3).clamp(-1, 1), 2 * clouds, 2.5 * clouds])
    kind = torch.randint(len(kinds), (count,), generator=g)
    return (0.5 + 0.5 * kinds[kind, torch.arange(count)]).clamp(0, 1)[:, None]


def _clutter(image: Tensor, g: torch.Generator, strokes: int, crumbs: int) -> tuple[Tensor, Tensor]:
    """Strokes and crumbs on top, and where they are."""
    count = len(image)
    x, y = _grid()
    covered = torch.zeros(count, SIZE, SIZE, dtype=torch.bool)
    for number in range(strokes + crumbs):
        cx, cy = _u(g, count, 1, 1, high=SIZE), _u(g, count, 1, 1, high=SIZE)
        turn = _u(g, count, 1, 1, low=-math.pi, high=math.pi)
        u = (x - cx) * turn.cos() + (y - cy) * turn.sin()
        v = (y - cy) * turn.cos() - (x - cx) * turn.sin()
        if number < strokes:
            here = (u.abs() < _u(g, count, 1, 1, low=3.0, high=10.0)) & (
                v.abs() < _u(g, count, 1, 1, low=0.5, high=1.2)
            )
        else:
            here = u.abs().pow(1.5) + v.abs().pow(1.5) < _u(g, count, 1, 1, low=1.0, high=2.6).pow(1.5)
        image = torch.where(here[:, None], _u(g, count, 3, 1, 1), image)
        covered |= here
    return image, covered


# --- shapes, in coordinates where the shape's radius is 1


def _polygon(u: Tensor, v: Tensor, corners: int, start: float = -math.pi / 2) -> Tensor:
    """The signed reach of a regular polygon: below 1 inside."""
    apothem = math.cos(math.pi / corners)
    angles = [start + math.pi / corners + 2 * math.pi * k / corners for k in range(corners)]
    return torch.stack([(u * math.cos(a) + v * math.sin(a)) / apothem for a in angles]).amax(0)


def _star(u: Tensor, v: Tensor) -> Tensor:
    angle = torch.remainder(torch.atan2(v, u), 2 * math.pi / 5) - math.pi / 5
    r = (u * u + v * v).sqrt()
    # from a tip (radius 1, at the sector's edge) straight to a notch (radius 0.42, at its middle)
    edge = math.pi / 5 - angle.abs()
    tip = torch.tensor([1.0, 0.0])
    notch = 0.42 * torch.tensor([math.cos(math.pi / 5), math.sin(math.pi / 5)])
    normal = torch.stack([notch[1] - tip[1], tip[0] - notch[0]])
    return (r * edge.cos() * normal[0] + r * edge.sin() * normal[1]) < (tip * normal).sum()


_SHAPES = {
    "disc": lambda u, v: u * u + v * v < 0.8,
    "ring": lambda u, v: (u * u + v * v < 0.9) & (u * u + v * v > 0.32),
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) < 0.72,
    "frame": lambda u, v: (torch.maximum(u.abs(), v.abs()) < 0.78) & (torch.maximum(u.abs(), v.abs()) > 0.42),
    "triangle": lambda u, v: _polygon(u, v, 3) < 1.0,
    "cross": lambda u, v: (torch.minimum(u.abs(), v.abs()) < 0.26) & (torch.maximum(u.abs(), v.abs()) < 0.92),
    "star": _star,
    "crescent": lambda u, v: (u * u + v * v < 0.95) & ((u - 0.45) ** 2 + v * v > 0.55),
    "hourglass": lambda u, v: (v.abs() < 0.85 * u.abs()) & (u.abs() < 0.8),
    "bar": lambda u, v: (u.abs() < 0.98) & (v.abs() < 0.34),
}
