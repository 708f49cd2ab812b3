"""Procedural captioned images, 32x32: textured shapes on plain or patterned grounds, in a few styles.

Everything is vectorised in torch and deterministic: `render(scenes, seed)` gives the same pixels on every run.
A study class is a texture and a shape ("striped star"); half of the shapes are base classes, half are new ones.
Pretraining never shows the `HELD_OUT` pairs, nor the blueprint rendering of `shift`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from demos.bundled_model.clips import DISTANCES, _box, _corners, _polygon

SIDE = 32

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.10, 0.12),
    "orange": (1.00, 0.52, 0.05),
    "yellow": (0.97, 0.90, 0.15),
    "green": (0.08, 0.62, 0.20),
    "cyan": (0.15, 0.85, 0.90),
    "blue": (0.12, 0.22, 0.90),
    "purple": (0.58, 0.14, 0.72),
    "pink": (0.98, 0.55, 0.75),
}
SIZES = {"small": 6.5, "large": 9.5}  # radius in pixels
PLACES = {"at the left": (-1, 0), "at the right": (1, 0), "at the top": (0, -1), "at the bottom": (0, 1)}
TEXTURES = ("plain", "striped", "dotted", "checkered")
GROUNDS = ("black", "white", "gray", "brown", "foggy", "lined")
STYLES = ("photo", "sketch", "negative", "grainy photo")
STYLE_WEIGHTS = (0.85, 0.05, 0.05, 0.05)


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    return _polygon(x, y, [(0.0, -1.3), (0.8, 0.0), (0.0, 1.3), (-0.8, 0.0)])


def _hexagon(x: Tensor, y: Tensor) -> Tensor:
    return _polygon(x, y, _corners([1.1] * 6))


def _bar(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 1.3, 0.5)


def _moon(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(x, y) - 1.1, 0.85 - torch.hypot(x - 0.6, y))


def _arrow(x: Tensor, y: Tensor) -> Tensor:
    head = _polygon(x, y, [(0.0, -1.3), (1.1, 0.0), (-1.1, 0.0)])
    return torch.minimum(head, _box(x, y - 0.6, 0.4, 0.7))


def _heart(x: Tensor, y: Tensor) -> Tensor:
    lobes = torch.hypot(x.abs() - 0.5, y + 0.4) - 0.6
    return torch.minimum(lobes, _polygon(x, y, [(-1.02, -0.1), (1.02, -0.1), (0.0, 1.2)]))


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **DISTANCES,
    "diamond": _diamond,
    "hexagon": _hexagon,
    "bar": _bar,
    "moon": _moon,
    "arrow": _arrow,
    "heart": _heart,
}
# Every other shape is a base shape; the list mixes round, pointed and crossed ones in both halves.
BASE_SHAPES = ("circle", "triangle", "cross", "diamond", "moon", "heart")
NEW_SHAPES = ("square", "star", "ring", "hexagon", "bar", "arrow")
# Pairs that pretraining never shows, three of base and three of new classes.
HELD_OUT = frozenset(
    {
        ("striped", "circle"),
        ("dotted", "cross"),
        ("checkered", "heart"),
        ("dotted", "square"),
        ("checkered", "ring"),
        ("striped", "arrow"),
    }
)
BASE_CLASSES = [f"{texture} {shape}" for texture, shape in product(TEXTURES, BASE_SHAPES)]
NEW_CLASSES = [f"{texture} {shape}" for texture, shape in product(TEXTURES, NEW_SHAPES)]


@dataclass(frozen=True)
class Scene:
    """What an image shows; every field is a word of the tables above."""

    shape: str
    texture: str
    colour: str
    size: str
    place: str  # "" is the middle
    ground: str
    style: str = "photo"


def draw(rng: random.Random, pairs: Sequence[tuple[str, str]], style: str | None = None) -> Scene:
    """A random scene whose texture and shape are one of `pairs`."""
    texture, shape = rng.choice(pairs)
    return Scene(
        shape=shape,
        texture=texture,
        colour=rng.choice(list(COLOURS)),
        size=rng.choice(list(SIZES)),
        place=rng.choice(["", *PLACES]),
        ground=rng.choice(GROUNDS),
        style=style or rng.choices(STYLES, STYLE_WEIGHTS)[0],
    )


def pretraining_pairs() -> list[tuple[str, str]]:
    """The textures and shapes that pretraining may show together."""
    return [pair for pair in product(TEXTURES, SHAPES) if pair not in HELD_OUT]


def caption(scene: Scene, rng: random.Random) -> str:
    """A random wording that may leave out colour, size, place and ground."""
    size = scene.size if rng.random() < 0.4 else ""
    colour = scene.colour if rng.random() < 0.6 else ""
    texture = scene.texture if scene.texture != "plain" or rng.random() < 0.7 else ""
    what = " ".join(part for part in (size, texture, colour, scene.shape) if part)
    place = scene.place if rng.random() < 0.4 else ""
    ground = rng.choice(["on a {} ground", "in front of a {} wall"]).format(scene.ground) if rng.random() < 0.4 else ""
    kind = scene.style if scene.style != "photo" else rng.choice(["photo", "photo", "picture", "image"])
    opening = rng.choice([f"a {kind} of a", f"a {kind} of the", f"a {kind} of one", "a"])
    if scene.style != "photo" and opening == "a":
        opening = f"{kind} of a"
    return " ".join(part for part in (opening, what, place, ground) if part)


def words() -> list[str]:
    """Captions that together hold every word."""
    rng = random.Random(0)
    pairs = pretraining_pairs()
    return [caption(draw(rng, pairs), rng) for _ in range(5000)]


def _grounds(names: Sequence[str], x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    count = len(names)
    phase = torch.rand(count, 1, 1, generator=generator) * 2 * math.pi
    fog = F.interpolate(torch.rand(count, 1, 5, 5, generator=generator), size=(SIDE, SIDE), mode="bicubic")[:, 0]
    table = {
        "black": torch.full_like(fog, 0.05).unsqueeze(1).expand(-1, 3, -1, -1),
        "white": torch.full_like(fog, 0.95).unsqueeze(1).expand(-1, 3, -1, -1),
        "gray": torch.full_like(fog, 0.5).unsqueeze(1).expand(-1, 3, -1, -1),
        "brown": torch.tensor([0.45, 0.30, 0.16])[None, :, None, None].expand(count, -1, SIDE, SIDE),
        "foggy": (0.35 + 0.4 * fog).unsqueeze(1).expand(-1, 3, -1, -1),
        "lined": (0.5 + 0.15 * torch.sin((x - y) * 0.55 + phase)).unsqueeze(1).expand(-1, 3, -1, -1),
    }
    return torch.stack([table[name][i] for i, name in enumerate(names)])


def _coat(names: Sequence[str], x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """How much of the paint's brightness stays, [N, H, W]: 1 is the paint, 0 its dark or light partner."""
    tilt = (torch.rand(len(names), 1, 1, generator=generator) - 0.5) * 0.5
    u = x * torch.cos(tilt) + y * torch.sin(tilt)
    v = y * torch.cos(tilt) - x * torch.sin(tilt)
    wave = 2 * math.pi / 5.0
    striped = torch.sigmoid(4 * torch.sin(u * wave))
    dotted = torch.sigmoid(6 * (0.75 - torch.cos(u * wave) - torch.cos(v * wave)))
    checkered = torch.sigmoid(8 * torch.sin(u * wave * 0.6) * torch.sin(v * wave * 0.6))
    table = {"plain": torch.ones_like(striped), "striped": striped, "dotted": dotted, "checkered": checkered}
    return torch.stack([table[name][i] for i, name in enumerate(names)])


def render(scenes: Sequence[Scene], seed: int) -> Tensor:
    """Images of `scenes`, [N, 3, 32, 32] in [0, 1]; the same seed and scenes give the same pixels."""
    generator = torch.Generator().manual_seed(seed)
    count = len(scenes)
    jitter = torch.rand(count, 4, generator=generator) * 2 - 1
    grid = torch.arange(SIDE) + 0.5 - SIDE / 2
    y, x = (axis.expand(count, -1, -1) for axis in torch.meshgrid(grid, grid, indexing="ij"))
    place = torch.tensor([PLACES.get(scene.place, (0, 0)) for scene in scenes], dtype=torch.float32) * 5.5
    centre = place + jitter[:, :2] * 1.5
    radius = (torch.tensor([SIZES[s.size] for s in scenes]) * (1 + 0.12 * jitter[:, 2]))[:, None, None]
    angle = (0.35 * jitter[:, 3])[:, None, None]
    dx, dy = x - centre[:, 0, None, None], y - centre[:, 1, None, None]
    u = (dx * torch.cos(angle) + dy * torch.sin(angle)) / radius
    v = (dy * torch.cos(angle) - dx * torch.sin(angle)) / radius
    distance = torch.empty(count, SIDE, SIDE)
    for shape, function in SHAPES.items():
        if rows := [i for i, scene in enumerate(scenes) if scene.shape == shape]:
            distance[rows] = function(u[rows], v[rows])
    cover = (0.5 - distance * radius / 1.5).clamp(0, 1)[:, None]
    paint = torch.tensor([COLOURS[scene.colour] for scene in scenes])[:, :, None, None]
    coat = _coat([scene.texture for scene in scenes], dx, dy, generator)[:, None]
    partner = torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.5, paint * 0.15, 0.2 * paint + 0.8)
    image = torch.lerp(_grounds([s.ground for s in scenes], x, y, generator), torch.lerp(partner, paint, coat), cover)
    light = torch.rand(count, 2, 1, 1, generator=generator) * 0.6 - 0.3
    image = image * (0.95 + (light[:, :1] * x[:, None] + light[:, 1:] * y[:, None]) / SIDE)
    return _styled(image, scenes, generator).clamp(0, 1)


def _styled(image: Tensor, scenes: Sequence[Scene], generator: torch.Generator) -> Tensor:
    noise = torch.randn(image.shape, generator=generator)
    image = image + 0.02 * noise
    out = image.clone()
    rows = {style: [i for i, s in enumerate(scenes) if s.style == style] for style in STYLES}
    out[rows["negative"]] = 1 - image[rows["negative"]]
    out[rows["grainy photo"]] = image[rows["grainy photo"]] + 0.15 * noise[rows["grainy photo"]]
    if drawn := rows["sketch"]:
        out[drawn] = 0.95 - 1.6 * contours(image[drawn]).expand(-1, 3, -1, -1)
    return out


def contours(images: Tensor) -> Tensor:
    """Strength of the edges of the grey image, [N, 1, H, W]."""
    grey = F.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across = (grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2]).abs()
    return torch.maximum(across, (grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]).abs())


def shift(images: Tensor, strength: float, seed: int) -> Tensor:
    """Mix with an unseen rendering: a grainy blueprint, light contours on dark blue.

    Args:
        images: [N, 3, H, W] in [0, 1].
        strength: 0 leaves them, 1 is the blueprint alone.
        seed: of the grain.
    """
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    ink = torch.tensor([0.10, 0.20, 0.55])[None, :, None, None]
    grey = images.mean(1, keepdim=True)
    drawing = ink + 1.2 * contours(images) * torch.tensor([1.0, 0.9, 0.5])[None, :, None, None]
    drawing = drawing + 0.25 * (0.5 - grey) + 0.18 * noise
    return torch.lerp(images, drawing, strength).clamp(0, 1)


def class_images(classes: Sequence[str], per_class: int, seed: int, strength: float) -> tuple[Tensor, Tensor]:
    """`per_class` shifted photos of every class: images [N, 3, 32, 32] and labels [N], grouped by class."""
    rng = random.Random(seed)
    pairs = [tuple(name.split()) for name in classes]
    scenes = [draw(rng, [pair], "photo") for pair in pairs for _ in range(per_class)]  # type: ignore[list-item]
    images = render(scenes, seed)
    return shift(images, strength, seed + 1), torch.arange(len(classes)).repeat_interleave(per_class)
