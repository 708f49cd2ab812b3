"""Procedural captioned clips: one coloured shape that moves over a soft grey background.

Everything is vectorised in torch and deterministic: `render(specs, seed)` gives the same pixels on every run.
A clip is 16 frames of 64x64. Shapes are signed distances with an edge about 1.5 px wide.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

FRAMES = 16
SIDE = 64
TRAVEL = 28.0  # pixels covered by a translation over the whole clip
EDGE = 1.5  # width of the soft edge in pixels

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.10, 0.12),
    "orange": (1.00, 0.52, 0.05),
    "yellow": (0.97, 0.90, 0.15),
    "green": (0.08, 0.62, 0.20),
    "cyan": (0.15, 0.85, 0.90),
    "blue": (0.12, 0.22, 0.90),
    "purple": (0.58, 0.14, 0.72),
}
SIZES: dict[str, float] = {"small": 8.0, "large": 13.0}
DIRECTIONS: dict[str, tuple[float, float]] = {
    "moving right": (1.0, 0.0),
    "moving left": (-1.0, 0.0),
    "moving up": (0.0, -1.0),
    "moving down": (0.0, 1.0),
}
MOTIONS: tuple[str, ...] = (*DIRECTIONS, "circling", "growing", "shrinking", "standing still")
BACKGROUNDS: tuple[str, ...] = ("black", "white", "grey gradient", "checkerboard", "stripes")

# The first wording of every list is the canonical one; the others are used in training only.
SHAPE_WORDS: dict[str, list[str]] = {
    "circle": ["circle", "disc", "ball"],
    "square": ["square", "box"],
    "triangle": ["triangle"],
    "star": ["star"],
    "cross": ["cross", "plus"],
    "ring": ["ring", "donut"],
}
SIZE_WORDS: dict[str, list[str]] = {"small": ["small", "little", "tiny"], "large": ["large", "big", "huge"]}
MOTION_WORDS: dict[str, list[str]] = {
    **{
        m: [m, f"{m.replace('moving', 'going')}", f"sliding {m.split()[1]}", f"that moves {m.split()[1]}"]
        for m in DIRECTIONS
    },
    "circling": ["circling", "moving in a circle", "going around"],
    "growing": ["growing", "getting bigger", "that grows"],
    "shrinking": ["shrinking", "getting smaller", "that shrinks"],
    "standing still": ["standing still", "staying still", "not moving", "at rest"],
}
BACKGROUND_WORDS: dict[str, list[str]] = {
    "black": ["on a black background", "on black", "in front of a black background"],
    "white": ["on a white background", "on white", "in front of a white background"],
    "grey gradient": ["on a grey gradient", "on a gray gradient", "on a gradient background"],
    "checkerboard": ["on a checkerboard", "on a checkerboard background", "in front of a checkerboard"],
    "stripes": ["on stripes", "on a striped background", "in front of stripes"],
}

# Combinations that no training clip shows: one colour and one motion per shape.
HELD_OUT_COLOURS = frozenset(
    {
        ("circle", "green"),
        ("square", "yellow"),
        ("triangle", "blue"),
        ("star", "red"),
        ("cross", "purple"),
        ("ring", "cyan"),
    }
)
HELD_OUT_MOTIONS = frozenset(
    {
        ("circle", "growing"),
        ("square", "moving left"),
        ("triangle", "moving down"),
        ("star", "circling"),
        ("cross", "moving up"),
        ("ring", "shrinking"),
    }
)


@dataclass(frozen=True)
class ClipSpec:
    """What a clip shows; every field is a key of the tables above."""

    shape: str
    colour: str
    size: str
    motion: str
    background: str


ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": tuple(SHAPE_WORDS),
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "motion": MOTIONS,
    "background": BACKGROUNDS,
}


def all_specs() -> list[ClipSpec]:
    """All 3,360 combinations, in a fixed order."""
    return [ClipSpec(*values) for values in product(*ATTRIBUTES.values())]


def held_out(spec: ClipSpec) -> bool:
    """Whether the combination is kept out of all training."""
    return (spec.shape, spec.colour) in HELD_OUT_COLOURS or (spec.shape, spec.motion) in HELD_OUT_MOTIONS


def training_specs() -> list[ClipSpec]:
    """The combinations that training may show."""
    return [spec for spec in all_specs() if not held_out(spec)]


def labels(specs: Sequence[ClipSpec]) -> dict[str, Tensor]:
    """Class indices of every attribute, one tensor of length `len(specs)` per attribute."""
    return {
        name: torch.tensor([values.index(getattr(spec, name)) for spec in specs]) for name, values in ATTRIBUTES.items()
    }


def caption(spec: ClipSpec, rng: random.Random | None = None) -> str:
    """The full canonical caption; with `rng` a random wording that may drop size, motion or background."""
    if rng is None:
        return f"a {spec.size} {spec.colour} {spec.shape} {spec.motion} {BACKGROUND_WORDS[spec.background][0]}"

    def pick(words: list[str]) -> str:
        return words[0] if rng.random() < 0.6 else rng.choice(words)

    size = pick(SIZE_WORDS[spec.size]) if rng.random() < 0.75 else ""
    motion = pick(MOTION_WORDS[spec.motion]) if rng.random() < 0.9 else ""
    background = pick(BACKGROUND_WORDS[spec.background]) if rng.random() < 0.75 else ""
    article = "a" if rng.random() < 0.9 else rng.choice(["the", "one", ""])
    parts = [article, size, spec.colour, pick(SHAPE_WORDS[spec.shape]), motion]
    subject = " ".join(part for part in parts if part)
    if background and rng.random() < 0.12:
        return f"{background}, {subject}"
    text = f"{subject} {background}".strip()
    return f"{text}." if rng.random() < 0.05 else text


def vocabulary() -> list[str]:
    """Every word a caption can contain, sorted; punctuation comes last."""
    phrases = [
        word
        for table in (SHAPE_WORDS, SIZE_WORDS, MOTION_WORDS, BACKGROUND_WORDS)
        for words in table.values()
        for word in words
    ]
    words = {word for phrase in phrases for word in phrase.split()} | set(COLOURS) | {"a", "the", "one"}
    return [*sorted(words), ",", "."]


# Signed distances of unit-sized shapes, negative inside; y points down.


def _box(x: Tensor, y: Tensor, half_x: float, half_y: float) -> Tensor:
    dx, dy = x.abs() - half_x, y.abs() - half_y
    outside = torch.hypot(dx.clamp(min=0), dy.clamp(min=0))
    return outside + torch.maximum(dx, dy).clamp(max=0)


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 1.0


def _square(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 0.9, 0.9)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 1.15, 0.38), _box(x, y, 0.38, 1.15))


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.80).abs() - 0.25


def _polygon(x: Tensor, y: Tensor, corners: Sequence[tuple[float, float]]) -> Tensor:
    """Exact signed distance to a closed polygon: nearest edge, sign from crossing parity."""
    squared = torch.full_like(x, math.inf)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(corners, (*corners[1:], corners[0]), strict=True):
        ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
        along = ((px * ex + py * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        squared = torch.minimum(squared, (px - along * ex) ** 2 + (py - along * ey) ** 2)
        if ey:
            inside ^= ((y >= ay) != (y >= by)) & (px < ex * py / ey)
    return torch.where(inside, -1.0, 1.0) * squared.sqrt()


def _corners(radii: Sequence[float]) -> list[tuple[float, float]]:
    """Corners at equal angles, the first one at the top."""
    angles = [2 * math.pi * k / len(radii) for k in range(len(radii))]
    return [(r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return _polygon(x, y - 0.2, _corners([1.3] * 3))


def _star(x: Tensor, y: Tensor) -> Tensor:
    return _polygon(x, y, _corners([1.3, 0.56] * 5))


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}


def background(name: str) -> Tensor:
    """A static grey background, [64, 64] in [0, 1]."""
    y, x = torch.meshgrid(*[torch.arange(SIDE) + 0.5] * 2, indexing="ij")
    if name == "black":
        return torch.full((SIDE, SIDE), 0.04)
    if name == "white":
        return torch.full((SIDE, SIDE), 0.96)
    if name == "grey gradient":
        return 0.20 + 0.55 * y / SIDE
    if name == "checkerboard":
        return 0.5 + 0.16 * torch.tanh(6 * torch.sin(math.pi * x / 16) * torch.sin(math.pi * y / 16))
    if name == "stripes":
        return 0.5 + 0.16 * torch.tanh(3 * torch.sin(math.pi * (x + y) / 16))
    raise ValueError(f"unknown background {name!r}: expected one of {BACKGROUNDS}")


def _paths(
    specs: Sequence[ClipSpec], generator: torch.Generator, frames: int = FRAMES
) -> tuple[Tensor, Tensor, Tensor]:
    """Centre x, centre y and radius, each [N, frames], with mild jitter of start, speed and radius."""
    count = len(specs)
    shift, speed, grain = (torch.rand(count, k, generator=generator) * 2 - 1 for k in (2, 1, 1))
    time = torch.linspace(-0.5, 0.5, frames)[None]
    motion = [spec.motion for spec in specs]
    radius = torch.tensor([SIZES[spec.size] for spec in specs])[:, None] * (1 + 0.06 * grain)
    direction = torch.tensor([DIRECTIONS.get(name, (0.0, 0.0)) for name in motion])
    travel = TRAVEL * (1 + 0.12 * speed) * time
    centre = SIDE / 2 + 4.0 * shift[:, :, None] + direction[:, :, None] * travel[:, None]
    circling = torch.tensor([name == "circling" for name in motion])[:, None]
    angle = 2 * math.pi * (time + 0.5) * frames / (frames + 1) * (1 + 0.05 * speed) + 0.4 * grain
    orbit = 11.0 * torch.stack([torch.sin(angle), -torch.cos(angle)], dim=1)
    centre = centre + torch.where(circling[:, None], orbit, torch.zeros(()))
    growth = torch.tensor([{"growing": 1.0, "shrinking": -1.0}.get(name, 0.0) for name in motion])[:, None]
    return centre[:, 0], centre[:, 1], radius * (1 + 0.8 * growth * (1 + 0.1 * speed) * time)


def render(specs: Sequence[ClipSpec], seed: int, frames: int = FRAMES) -> Tensor:
    """Clips of `specs`, [N, frames, 3, 64, 64] in [0, 1]; the same seed and specs give the same pixels.

    More frames show the same path in smaller steps.
    """
    cx, cy, radius = _paths(specs, torch.Generator().manual_seed(seed), frames)
    grid = torch.arange(SIDE) + 0.5
    x = ((grid[None, None, None, :] - cx[..., None, None]) / radius[..., None, None]).expand(-1, -1, SIDE, -1)
    y = ((grid[None, None, :, None] - cy[..., None, None]) / radius[..., None, None]).expand(-1, -1, -1, SIDE)
    distance = torch.empty(len(specs), frames, SIDE, SIDE)
    for shape, function in DISTANCES.items():
        rows = [i for i, spec in enumerate(specs) if spec.shape == shape]
        if rows:
            distance[rows] = function(x[rows], y[rows])
    edge = (0.5 - distance * radius[..., None, None] / EDGE).clamp(0, 1)
    cover = (edge * edge * (3 - 2 * edge))[:, :, None]
    paint = torch.tensor([COLOURS[spec.colour] for spec in specs])[:, None, :, None, None]
    plates = {name: background(name) for name in {spec.background for spec in specs}}
    ground = torch.stack([plates[spec.background] for spec in specs])[:, None, None]
    return torch.lerp(ground.expand(-1, frames, 3, -1, -1), paint.expand(-1, frames, -1, SIDE, SIDE), cover)
