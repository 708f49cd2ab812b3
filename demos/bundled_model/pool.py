"""Encoded training clips: enough to begin with, then a few fresh ones with every step.

Clip number i is a function of i and the seed: one of the training combinations, rendered with jitter of its own. The
pool is a ring in a memory-mapped file; a run that goes on elsewhere fills a new one from the number it had come to.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from tqdm import tqdm

from demos.bundled_model.autoencoder import FRAMES, encode_clips
from demos.bundled_model.clips import ClipSpec, render, training_specs
from demos.bundled_model.common import atomically
from demos.bundled_model.model import latent_shape


class ClipPool:
    """A ring of latents and what they show.

    Args:
        vae: encodes the clips.
        folder: of the files; a pool that is there is taken up again.
        size: clips the ring holds.
        start: number of the first clip of a new pool.
    """

    def __init__(self, vae: AutoencoderKLWan, folder: Path, size: int, seed: int, start: int = 0) -> None:
        self.vae, self.size, self.seed = vae, size, seed
        self.first = self.next = start
        self.note = folder / "pool.json"
        path = folder / "pool.f16"
        known = json.loads(self.note.read_text()) if self.note.exists() and path.exists() else None
        if known is not None and known["size"] == size and known["seed"] == seed:
            self.first, self.next = known["first"], known["next"]
            self.latents = np.memmap(path, np.float16, "r+", shape=latent_shape(size))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self.latents = np.memmap(path, np.float16, "w+", shape=latent_shape(size))
        self._every = training_specs()
        self._orders: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return min(self.size, self.next - self.first)

    def spec(self, number: int) -> ClipSpec:
        """Which combination a clip shows: every one once before any comes again."""
        epoch, place = divmod(number, len(self._every))
        if epoch not in self._orders:
            count = len(self._every)
            self._orders[epoch] = random.Random(self.seed * 7919 + epoch).sample(range(count), count)
        return self._every[self._orders[epoch][place]]

    def grow(self, count: int) -> None:
        """Encode the next `count` clips; once the ring is full they replace the oldest."""
        for _ in range(count):
            number = self.next
            clip = render([self.spec(number)], self.seed * 1_000_003 + number, FRAMES)
            self.latents[number % self.size] = encode_clips(self.vae, clip)[0].half().numpy()
            self.next += 1

    def fill(self, count: int) -> None:
        """Have at least `count` clips."""
        for _ in tqdm(range(len(self), min(count, self.size)), desc="encode", mininterval=10):
            self.grow(1)
        self.save()

    def save(self) -> None:
        """Note how far the ring has come."""
        self.latents.flush()
        known = {"size": self.size, "seed": self.seed, "first": self.first, "next": self.next}
        atomically(self.note, lambda path: path.write_text(json.dumps(known) + "\n"))

    def draw(self, count: int, rng: random.Random) -> tuple[Tensor, list[ClipSpec]]:
        """Random clips of the pool: latents `[count, C, T, H, W]` and what they show."""
        oldest = max(self.first, self.next - self.size)
        numbers = [rng.randrange(oldest, self.next) for _ in range(count)]
        rows = self.latents[[number % self.size for number in numbers]]
        return torch.from_numpy(rows.astype(np.float32)), [self.spec(number) for number in numbers]
