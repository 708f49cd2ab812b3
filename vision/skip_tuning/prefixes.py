"""The output of the frozen layers for the training images, computed once per view."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipguide.vision.skip_tuning.cache import FeatureCache, cache_key, place_for
from skipguide.vision.skip_tuning.config import TuneConfig
from skipguide.vision.skip_tuning.inputs import Examples
from skipguide.vision.skip_tuning.options import RunOptions
from skipguide.vision.skip_tuning.precision import autocast
from skipguide.vision.skip_tuning.trainable_classifier import TrainableClassifier

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class ImagePrefixes:
    """Prefix features of the training images, one cache per view."""

    def __init__(
        self,
        tuner: TrainableClassifier,
        examples: Examples,
        config: TuneConfig,
        options: RunOptions,
        dtype: torch.dtype,
    ) -> None:
        self.tuner, self.examples, self.config, self.options = tuner, examples, config, options
        self.dtype = dtype if config.cache_dtype == "auto" else DTYPES[config.cache_dtype]
        self.compute = dtype
        self.augmented = config.augment is not None or options.transform is not None
        self.views = 1 if not self.augmented else config.views
        self.caches: dict[int, FeatureCache] = {}
        self.seconds = 0.0
        self.marks = ""

    def view_of(self, epoch: int) -> int:
        """Which view an epoch sees."""
        return epoch if self.views == "per_epoch" else epoch % self.views

    def cache(self, epoch: int) -> FeatureCache:
        """The features of an epoch, computed if they are not there yet."""
        view = self.view_of(epoch)
        if view not in self.caches:
            if self.views == "per_epoch":
                self.caches.clear()
            began = time.perf_counter()
            self.caches[view] = self._build(view)
            self.seconds += time.perf_counter() - began
        return self.caches[view]

    @property
    def bytes(self) -> int:
        """How much all views hold."""
        return sum(cache.bytes for cache in self.caches.values())

    @torch.no_grad()
    def extract(self, places: list[int], view: int) -> Tensor:
        """Prefix features [N, L, width] of some images."""
        tuner = self.tuner
        pixels = torch.stack([self.pixels(i, view) for i in places]).to(tuner.device)
        # A frozen prefix that is in half precision already stays in its own: autocast to the other half type fails.
        own = next(tuner.pretrained.parameters()).dtype
        with autocast(tuner.device, self.compute if own == torch.float32 else torch.float32):
            hidden = tuner.towers.image.prefix(tuner.cast(pixels), tuner.image_layer)
        return hidden.to(self.dtype)

    def pixels(self, place: int, view: int) -> Tensor:
        """Prepared pixels of one image in one view; the same for the same seed."""
        item = self.examples.load(place)
        if not self.augmented:
            return self.tuner.prepare.pixels(item)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash((self.config.seed, view, place)) % 2**63)
            if self.options.transform is not None:
                return self.tuner.prepare.pixels(self.options.transform(item))
            return self.tuner.prepare.pixels(_crop(item, self.tuner.towers.image_size))

    def _build(self, view: int) -> FeatureCache:
        tuner, config, count = self.tuner, self.config, len(self.examples)
        tuner.prefix_to(tuner.device)
        row = self.extract([0], view)[0]
        size = row.numel() * row.element_size()
        total = size * count * (1 if self.views == "per_epoch" else self.views)
        folder = None if self.options.cache_dir is None else Path(self.options.cache_dir)
        place = place_for(config.cache, total, config.cache_limit, tuner.device, folder)
        parts: dict[str, Any] = {}
        if place == "disk":
            parts = self._parts(view) | {"row_bytes": size}
            if self.options.cache_refresh:
                import shutil

                shutil.rmtree(folder / f"features-{cache_key(parts)}", ignore_errors=True)  # type: ignore[operator]
        built = FeatureCache.build(
            lambda places: self.extract(places, view),
            count,
            place=place,
            device=tuner.device,
            batch=config.extract_batch,
            folder=folder,
            parts=parts,
            limit=config.cache_limit,
            progress=self.options.progress,
        )
        if self.views == 1 or (self.views != "per_epoch" and len(self.caches) == self.views - 1):
            tuner.prefix_to(torch.device("cpu"))
        return built

    def _parts(self, view: int) -> dict[str, Any]:
        import hashlib

        if not self.marks:
            digest = hashlib.blake2b(digest_size=16)
            for i in range(len(self.examples)):
                digest.update(self.examples.mark(i))
            self.marks = digest.hexdigest()
        return {
            "model": self.tuner.fingerprint,
            "layer": self.tuner.image_layer,
            "preprocessing": self.tuner.prepare.name,
            "augment": repr(self.options.transform or self.config.augment),
            "seed": self.config.seed if self.augmented else 0,
            "view": view,
            "dtype": str(self.dtype),
            "compute": str(self.compute),
            "images": self.marks,
        }


def _crop(item: Any, size: int) -> Any:
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(size, scale=(0.08, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.RandomHorizontalFlip()(crop(item))
