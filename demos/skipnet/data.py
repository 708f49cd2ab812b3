"""Images for SkipNet: made-up wires whose needed depth differs, sklearn's digits, torchvision's sets where present."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from demos.skipnet.wires import make_wires
from skipguide.errors import SkipError

TORCHVISION = {"cifar10": ("CIFAR10", 10), "cifar100": ("CIFAR100", 100), "svhn": ("SVHN", 10)}


@dataclass(frozen=True)
class Split:
    """Images in [0, 1], labels, and what is known of their difficulty (steps of the wire, level of the noise)."""

    images: Tensor
    labels: Tensor
    difficulty: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def dataset(self) -> TensorDataset:
        """As `train` takes it."""
        return TensorDataset(self.images, self.labels)


@dataclass(frozen=True)
class Data:
    """Three splits: nothing is chosen on the test images."""

    train: Split
    validation: Split
    test: Split


def wires(size: int, longest: tuple[int, int], counts: tuple[int, int, int], seed: int) -> Data:
    """Made-up wires, half of them short and half up to long; every split has seeds of its own."""
    splits = []
    for at, count in enumerate(counts):
        parts = [make_wires(count // 2, size, most, seed=1000 * seed + 10 * at + n) for n, most in enumerate(longest)]
        images, labels, lengths = (torch.cat([getattr(p, f) for p in parts]) for f in ("images", "labels", "lengths"))
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        splits.append(Split(images[order], labels[order], lengths[order].float()))
    return Data(*splits)


def digits(counts: tuple[int, int, int], seed: int, copies: int = 3, noise: float = 0.5) -> Data:
    """sklearn's 8x8 digits, split by a seed, with noise of a level that is drawn per image (its difficulty)."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float)[:, None] / 16
    labels = torch.tensor(found.target)
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=random)
    if sum(counts) > len(labels):
        raise SkipError(f"there are {len(labels)} digits; got splits of {counts}")
    splits = []
    for part, times in zip(order[: sum(counts)].split(counts), (8 * copies, copies, copies), strict=True):
        part = part.repeat(times)
        level = noise * torch.rand(len(part), generator=random)
        noisy = images[part] + level[:, None, None, None] * torch.randn(len(part), 1, 8, 8, generator=random)
        splits.append(Split(noisy, labels[part], level))
    return Data(*splits)


def torchvision_set(name: str, root: Path, download: bool = False) -> Data:
    """CIFAR-10, CIFAR-100 or SVHN, if `root` has it; the last tenth of the training images is for validation."""
    from torchvision import datasets

    if name not in TORCHVISION:
        raise SkipError(f"unknown set {name!r}; expected wires, digits or one of {', '.join(TORCHVISION)}")
    builder = getattr(datasets, TORCHVISION[name][0])
    parts = ("train", "test") if name == "svhn" else (True, False)
    key = "split" if name == "svhn" else "train"
    try:
        train, test = (builder(root, **{key: part}, download=download) for part in parts)
    except RuntimeError as error:
        raise SkipError(f"{name} is not in {root}: pass download, or put it there ({error})") from error
    splits = []
    for found in (train, test):
        pixels = torch.as_tensor(found.data)
        images = (pixels if name == "svhn" else pixels.permute(0, 3, 1, 2)).float() / 255
        labels = torch.as_tensor(found.labels if name == "svhn" else found.targets).long()
        splits.append(Split(images, labels, torch.zeros(len(labels))))
    last = len(splits[0]) * 9 // 10
    first = Split(splits[0].images[:last], splits[0].labels[:last], splits[0].difficulty[:last])
    rest = Split(splits[0].images[last:], splits[0].labels[last:], splits[0].difficulty[last:])
    return Data(first, rest, splits[1])
