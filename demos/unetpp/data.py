"""Pictures with masks: made up, or from a folder of yours; and the batch of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from demos.training import rows_of_step
from skipguide.errors import SkipError
from skipguide.media.frames import as_rgb
from skipguide.vision.segmentation import inside_of
from skipguide.vision.unetpp.nuclei import generate_nuclei

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


@dataclass(frozen=True)
class Pictures:
    """Pictures `[3, H, W]` in 0..1 and masks `[classes, H, W]` of 0 and 1; sizes may differ."""

    images: Sequence[Tensor]
    masks: Sequence[Tensor]
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def made_up(cls, first: int, count: int, size: int) -> Pictures:
        """Nuclei from seed `first` on."""
        pairs = [generate_nuclei(seed, size) for seed in range(first, first + count)]
        return cls([i for i, _ in pairs], [m for _, m in pairs], [f"nuclei-{first + at}" for at in range(count)])

    @classmethod
    def of_folder(cls, root: Path) -> Pictures:
        """Read `root/images/NAME.*` and `root/masks/NAME.*`; a mask is inside where it is at least half white.

        Raises:
            SkipError: if there are none, a mask is missing or holds small numbers, or sizes differ.
        """
        images, masks = _files(root / "images"), _files(root / "masks")
        if not images:
            raise SkipError(f"expected pictures in {root}/images and masks of the same names in {root}/masks")
        if missing := sorted(set(images) - set(masks)):
            raise SkipError(f"{len(missing)} pictures lack a mask in {root}/masks, such as {missing[:3]}")
        names = sorted(images)
        found_images, found_masks = [], []
        for name in names:
            with Image.open(images[name]) as picture, Image.open(masks[name]) as mask:
                if picture.size != mask.size:
                    raise SkipError(f"{name}: the picture has {picture.size} pixels and its mask {mask.size}")
                found_images.append(_floats(as_rgb(picture, images[name])).permute(2, 0, 1))
                found_masks.append(inside_of(mask, masks[name]).float()[None])
        return cls(found_images, found_masks, names)

    def split(self, share: float, seed: int) -> tuple[Pictures, Pictures]:
        """A part for training and one (of that share, at least one picture) for validation."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        count = max(1, round(share * len(self)))
        if count >= len(self):
            raise SkipError(f"expected at least two pictures, to keep some for validation; got {len(self)}")
        return self.pick(sorted(order[count:])), self.pick(sorted(order[:count]))

    def pick(self, rows: Sequence[int]) -> Pictures:
        """Some of them."""
        return Pictures([self.images[r] for r in rows], [self.masks[r] for r in rows], [self.names[r] for r in rows])

    def batch(self, size: int, crop: int, step: int, seed: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
        """Random crops, turned and mirrored, `[size, C, crop, crop]`: a function of the step's number."""
        generator = torch.Generator().manual_seed((1_000_003 * seed + step) * 4096 + rank)
        images, masks = [], []
        for row in rows_of_step(len(self), size, step, seed, rank, world).tolist():
            joined = torch.cat([self.images[row], self.masks[row]])
            pad = [max(0, crop - side) for side in joined.shape[-2:]]
            if any(pad):
                joined = F.pad(joined[None], (0, pad[1], 0, pad[0]), mode="replicate")[0]
            top, left = (int(torch.randint(side - crop + 1, (), generator=generator)) for side in joined.shape[-2:])
            joined = joined[:, top : top + crop, left : left + crop]
            turn, mirror = torch.randint(4, (2,), generator=generator).tolist()
            joined = torch.rot90(joined, turn, (1, 2))
            joined = joined.flip(2) if mirror % 2 else joined
            images.append(joined[:3])
            masks.append(joined[3:])
        return torch.stack(images), torch.stack(masks)


def _files(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.glob("*")) if path.suffix.lower() in SUFFIXES}


def _floats(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)
