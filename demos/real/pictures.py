"""Pictures of the real world: those that scikit-image and scikit-learn ship, and the photos beside the project."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from demos.real.weights import NotInstalledError

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
# ImageNet's classes are sorted: its animals come first, those with hooves among them
ANIMALS, HOOFED = range(398), range(339, 356)
# shipped with scikit-image and scikit-learn, and of the real world
SHIPPED = ("astronaut", "chelsea", "coffee", "rocket", "china.jpg", "flower.jpg")


@dataclass(frozen=True)
class Photo:
    """A photo with its ImageNet class."""

    name: str
    label: int
    jpeg: bytes

    def open(self) -> Image.Image:
        """The picture."""
        return Image.open(io.BytesIO(self.jpeg)).convert("RGB")


def data_file(name: str) -> Path:
    """A file of real data beside the project.

    Raises:
        NotInstalledError: where it is not there.
    """
    path = DATA / name
    if not path.is_file():
        raise NotInstalledError(f"no data: expected {path} (what it is made of says {DATA / 'README.md'})")
    return path


def jpegs(name: str) -> Iterator[bytes]:
    """The pictures of a file that holds all JPEG bytes in one array."""
    with np.load(data_file(name)) as data:
        bytes_, offsets = data["jpeg"].tobytes(), data["offsets"]
    return (bytes_[a:b] for a, b in pairwise(offsets))


def photos() -> list[Photo]:
    """250 ImageNet photos, of every fourth class one.

    Raises:
        NotInstalledError: without `../shared/data/photos`.
    """
    with np.load(data_file("photos/photos.npz")) as data:
        about = list(zip(data["names"].tolist(), data["labels"].tolist(), strict=True))
    pairs = zip(about, jpegs("photos/photos.npz"), strict=True)
    return [Photo(str(name), int(label), jpeg) for (name, label), jpeg in pairs]


def shipped(name: str) -> Image.Image:
    """One of `SHIPPED`.

    Raises:
        NotInstalledError: without scikit-image or scikit-learn.
    """
    try:
        if name.endswith(".jpg"):
            from sklearn.datasets import load_sample_image

            return Image.fromarray(load_sample_image(name))
        from skimage import data
    except ImportError as error:
        raise NotInstalledError(f"{error.name} is not installed: pip install 'skipguide[studies]'") from error
    return Image.fromarray(getattr(data, name)())


def horse(size: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """A horse's outline somewhere in a square, and an ellipse in its place with its area and its box's proportions.

    Args:
        size: of the square.
        share: of its width that the horse takes.
        seed: of the place and of which way it looks.

    Returns:
        Two bool `[size, size]`, True inside.
    """
    from skimage.data import horse as drawn

    outline = torch.from_numpy(~drawn().astype(bool))
    rows, columns = outline.any(1).nonzero()[:, 0], outline.any(0).nonzero()[:, 0]
    outline = outline[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    width = round(share * size)
    height = round(width * outline.shape[0] / outline.shape[1])
    small = F.interpolate(outline[None, None].float(), (height, width), mode="bilinear", antialias=True)[0, 0] > 0.5
    g = torch.Generator().manual_seed(seed)
    if torch.rand(1, generator=g) < 0.5:
        small = small.flip(1)
    top = int(torch.randint(size - height + 1, (1,), generator=g))
    left = int(torch.randint(size - width + 1, (1,), generator=g))
    found = torch.zeros(size, size, dtype=torch.bool)
    found[top : top + height, left : left + width] = small
    y = (torch.arange(size)[:, None] + 0.5 - top - height / 2) / height
    x = (torch.arange(size)[None] + 0.5 - left - width / 2) / width
    # the ellipse whose area is the horse's: its half axes are a share of the box's sides
    radius = (int(small.sum()) / (np.pi * height * width)) ** 0.5
    return found, (x / radius).square() + (y / radius).square() < 1
