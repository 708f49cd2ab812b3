"""Where an autoencoder's training looks, and what it minimises."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from demos.bundled_model.clips import SIDE

CROP = 32
POINTS = 8  # outline points kept per frame


def outline_points(pool: Tensor) -> Tensor:
    """`POINTS` random pixels (y, x) just outside each frame's coloured shape, [N, POINTS, 2]."""
    found = []
    for frames in pool.split(1024):
        coloured = ((frames.amax(1) - frames.amin(1)) > 40).float()[:, None]
        outline = (F.max_pool2d(coloured, 3, 1, 1) - coloured)[:, 0].flatten(1) + 1e-6
        index = torch.multinomial(outline, POINTS, replacement=True)
        found.append(torch.stack([index // SIDE, index % SIDE], dim=-1))
    return torch.cat(found)


def crop_places(points: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Rows and corners of random crops, four in five around an outline, on the latent's grid of four pixels."""
    rows = torch.randint(len(points), (size,))
    corner = points[rows, torch.randint(POINTS, (size,))] - CROP // 2 + torch.randint(-10, 11, (size, 2))
    corner = torch.where(torch.rand(size, 1) < 0.2, torch.randint(0, SIDE - CROP + 1, (size, 2)), corner)
    return rows, (corner.clamp(0, SIDE - CROP) / 4).round().long() * 4


def autoencoder_loss(
    mean: Tensor,
    logvar: Tensor,
    decode: Callable[[Tensor], Tensor],
    frames: Tensor,
    kl_weight: float,
    noise: float,
) -> tuple[Tensor, float]:
    """Squared error, a little absolute error and KL; returns the loss and the squared error alone."""
    logvar = logvar.clamp(-12, 4)
    spread = noise * mean.detach().std() * torch.rand(len(mean), 1, 1, 1)
    latent = mean + torch.randn_like(mean) * torch.hypot((0.5 * logvar).exp(), spread)
    error = decode(latent) - frames
    squared = error.square().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return squared + 0.05 * error.abs().mean() + kl_weight * kl, squared.item()
