"""The autoencoder of the next bundled model: a stock `AutoencoderKLWan`, and how it is trained as a network of images.

Its causal convolutions over time see zeros before the first frame. With the taps of the past at zero, every convolution
but the two that join and part frames is exact per frame: `as_images` runs it as a 2-D convolution with the last tap,
many times faster than the stock 3-D one. What is saved are stock weights, and the stock class computes the same.

Two frames share a latent; the first frame of a clip has one of its own, as in every Wan autoencoder: 17 frames of
64x64 are 9 latents of 16x16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanResample,
    WanRMS_norm,
)
from torch import Tensor, nn
from torch.nn import functional as F

FRAMES = 17
LATENT_CHANNELS = 8
LATENT_FRAMES = 9
LATENT_SIDE = 16


def build_vae(
    base: int = 16, dim_mult: tuple[int, ...] = (1, 2, 3), channels: int = LATENT_CHANNELS
) -> AutoencoderKLWan:
    """The untrained autoencoder: variance kept through the chain, nothing taken from past frames."""
    vae = AutoencoderKLWan(
        base_dim=base,
        z_dim=channels,
        dim_mult=list(dim_mult),
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[False, True],
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )
    for name, module in vae.named_modules():
        if not isinstance(module, (nn.Conv2d, WanCausalConv3d)):
            continue
        weight = module.weight.data
        used = weight
        if weight.ndim == 5:  # a causal convolution: the last tap is the present
            used = weight[:, :, 1:] if name.endswith("time_conv") and "encoder" in name else weight[:, :, -1:]
        fresh = torch.empty_like(used, memory_format=torch.contiguous_format)
        nn.init.kaiming_normal_(fresh, nonlinearity="linear")
        if name.endswith(("conv2", "attentions.0.proj")):  # the end of a residual branch
            fresh.mul_(0.3)
        if name.endswith("quant_conv"):
            nn.init.dirac_(fresh)
        weight.zero_()
        used.copy_(fresh)
        nn.init.zeros_(module.bias)
    join_alike(vae)
    return vae


@torch.no_grad()
def join_alike(vae: AutoencoderKLWan, noise: float = 0.05) -> None:
    """Let the latent of two equal frames be that of one frame alone, nearly.

    The first frame of a clip passes by the convolutions over time. Started at random they gave it a code of its own, in
    which black was what white is in the other latents, and a transformer with relative positions had to tell it apart.
    """
    for name, module in vae.named_modules():
        if name.endswith("time_conv"):
            weight = module.weight.zero_()[..., 0, 0]  # [out, in, taps]
            same = torch.eye(weight.shape[1])
            if "encoder" in name:
                weight[..., 1:] = 0.5 * same[..., None]
            else:
                weight[..., -1] = same.repeat(2, 1)
            used = weight[..., 1:] if "encoder" in name else weight[..., -1:]
            used.add_(noise * torch.randn_like(used) * weight.shape[1] ** -0.5)
            nn.init.zeros_(module.bias)


@contextmanager
def as_images(vae: AutoencoderKLWan) -> Iterator[None]:
    """While it is open, `encoder` and `decoder` take frames `[N, C, H, W]`; for training only.

    Every two frames in a row count as a pair; `alone(vae)` says that each counts as the first of a clip.
    """
    modules = [module for module in vae.modules() if isinstance(module, tuple(FORWARDS))]
    for module in modules:
        module.forward = FORWARDS[type(module)].__get__(module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def alone(vae: AutoencoderKLWan, on: bool) -> None:
    """Whether frames are first frames, which join with no other."""
    for module in vae.modules():
        if isinstance(module, WanResample):
            module.alone = on


def _conv(self: WanCausalConv3d, x: Tensor, cache_x: None = None) -> Tensor:
    return F.conv2d(x, self.weight[:, :, -1], self.bias, padding=self._padding[0])


def _norm(self: WanRMS_norm, x: Tensor) -> Tensor:
    length = x.square().sum(1, keepdim=True).clamp(min=1e-24).rsqrt() * self.scale
    return x * length * self.gamma.view(1, -1, 1, 1)


def _attention(self: WanAttentionBlock, x: Tensor) -> Tensor:
    query, key, value = self.to_qkv(self.norm(x)).flatten(2).mT.chunk(3, dim=-1)
    mixed = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
    return x + self.proj(mixed.mT.reshape(x.shape))


def _resample(self: WanResample, x: Tensor, feat_cache: None = None, feat_idx: object = None) -> Tensor:
    paired = not getattr(self, "alone", False)
    if self.mode == "upsample3d" and paired:
        x = F.conv2d(x, self.time_conv.weight[:, :, -1], self.time_conv.bias).unflatten(1, (2, -1)).flatten(0, 1)
    x = self.resample(x)
    if self.mode == "downsample3d" and paired:
        taps = self.time_conv.weight[:, :, 1:].flatten(3)[..., 0]  # [out, in, 2]
        x = F.conv2d(
            x.unflatten(0, (-1, 2)).flatten(1, 2), taps.transpose(1, 2).flatten(1)[..., None, None], self.time_conv.bias
        )
    return x


FORWARDS = {WanCausalConv3d: _conv, WanRMS_norm: _norm, WanAttentionBlock: _attention, WanResample: _resample}


def to_input(frames: Tensor) -> Tensor:
    """uint8 or [0, 1] frames to the autoencoder's range."""
    scaled = frames.float() / 127.5 - 1 if frames.dtype == torch.uint8 else frames * 2 - 1
    return scaled.contiguous(memory_format=torch.channels_last)


def encode_frames(vae: AutoencoderKLWan, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance of frames `[N, 3, H, W]` in the autoencoder's range; under `as_images`."""
    mean, logvar = vae.quant_conv(vae.encoder(frames)).chunk(2, dim=1)
    return mean, logvar


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    """Standardised latents `[N, C, 9, 16, 16]` of clips `[N, 17, 3, 64, 64]` in [0, 1]; equal to the stock `encode`."""
    count = len(clips)
    with as_images(vae):
        alone(vae, True)
        first, _ = encode_frames(vae, to_input(clips[:, 0]))
        alone(vae, False)
        rest, _ = encode_frames(vae, to_input(clips[:, 1:].flatten(0, 1)))
    latents = torch.cat([first[:, None], rest.unflatten(0, (count, -1))], dim=1).transpose(1, 2)
    mean, std = (
        torch.tensor(getattr(vae.config, name)).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    return (latents - mean) / std


def load_vae(path: Path) -> AutoencoderKLWan:
    """The trained autoencoder in fp32."""
    return AutoencoderKLWan.from_pretrained(path, torch_dtype=torch.float32).eval().requires_grad_(False)
