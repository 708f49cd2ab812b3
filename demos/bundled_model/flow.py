"""Flow matching: noise levels, what a noised latent is, and the velocity to predict."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_sigmas(count: int, shift: float) -> Tensor:
    """Noise levels: three quarters logit-normal, one quarter uniform, then the sampler's shift."""
    uniform = torch.rand(count) < 0.25
    sigma = torch.where(uniform, torch.rand(count), torch.randn(count).sigmoid())
    return shift * sigma / (1 + (shift - 1) * sigma)


def noise_like(latents: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Noised latents and the velocity to predict."""
    noise = torch.randn_like(latents)
    level = sigma.view(-1, *[1] * (latents.ndim - 1))
    return torch.lerp(latents, noise, level), noise - latents
