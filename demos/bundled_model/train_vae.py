"""Train the bundled model's VAE: a stock 2-D `AutoencoderKL`, four times smaller in each direction.

Most of the time goes into 32x32 crops around the shape's outline, which cost a quarter of a frame; the last
third uses whole frames, as group norms see other statistics there. In between, the latent's channels are
standardised by folding mean and deviation into the weights, because `LattePipeline` knows one scaling factor
and no shift.

    python -m demos.bundled_model.train_vae --out runs/vae --minutes 15
"""

from __future__ import annotations

import argparse
import logging
import math
import random
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from demos.bundled_model.clips import FRAMES, SIDE, ClipSpec, all_specs, held_out, render, training_specs
from demos.bundled_model.common import Clock, Ema, atomically, log_row
from demos.bundled_model.optim import optimizers

logger = logging.getLogger(__name__)
CROP = 32
POINTS = 8  # outline points kept per frame


def build_vae() -> AutoencoderKL:
    """The untrained VAE, with an initialisation that keeps the signal's variance through the chain."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=SIDE,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
            if name.endswith("conv2"):  # the end of a residual branch
                module.weight.data.mul_(0.3)
    return vae


def frame_pool(specs: list[ClipSpec], clips: int, seed: int, per_clip: int = 4) -> Tensor:
    """Frames of random clips, uint8 [clips * per_clip, 3, 64, 64]."""
    rng = random.Random(seed)
    frames = []
    for start in tqdm(range(0, clips, 128), desc="frames", mininterval=5):
        batch = render(rng.choices(specs, k=min(128, clips - start)), seed * 1_000_003 + start)
        for clip in batch:
            picked = clip[rng.sample(range(FRAMES), per_clip)]
            frames.append((picked * 255).round().to(torch.uint8))
    return torch.cat(frames)


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


def crops(pool: Tensor, points: Tensor, size: int) -> Tensor:
    """The crops at such places."""
    rows, corner = crop_places(points, size)
    offsets = torch.arange(CROP)
    y, x = corner[:, :1] + offsets, corner[:, 1:] + offsets
    channels = torch.arange(3)[None, :, None, None]
    return pool[rows[:, None, None, None], channels, y[:, None, :, None], x[:, None, None]]


def to_input(frames: Tensor) -> Tensor:
    return (frames.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


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


def loss_of(vae: AutoencoderKL, frames: Tensor, kl_weight: float, noise: float) -> tuple[Tensor, float]:
    """The loss of the stock autoencoder of single frames."""
    mean, logvar = vae.encoder(frames).chunk(2, dim=1)
    return autoencoder_loss(mean, logvar, vae.decoder, frames, kl_weight, noise)


@torch.no_grad()
def encode(vae: AutoencoderKL, frames: Tensor) -> Tensor:
    """Posterior means of uint8 frames, before scaling."""
    return torch.cat([vae.encoder(to_input(f)).chunk(2, dim=1)[0] for f in frames.split(64)])


@torch.no_grad()
def psnr(vae: AutoencoderKL, frames: Tensor) -> float:
    """Peak signal to noise ratio over all pixels of uint8 frames, in dB."""
    total = 0.0
    for batch in frames.split(64):
        target = to_input(batch)
        decoded = vae.decoder(vae.encoder(target).chunk(2, dim=1)[0]).clamp(-1, 1)
        total += (decoded - target).square().mean().item() * len(batch)
    return 10 * math.log10(4 / (total / len(frames)))


@torch.no_grad()
def standardise(vae: AutoencoderKL, frames: Tensor) -> None:
    """Fold every latent channel's mean and deviation into the layers on both of its sides."""
    latents = encode(vae, frames)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    last, first = vae.encoder.conv_out, vae.decoder.conv_in
    half = len(mean)
    first.bias.add_(torch.einsum("oikl,i->o", first.weight, mean))
    first.weight.mul_(std[None, :, None, None])
    last.weight[:half].div_(std[:, None, None, None])
    last.bias[:half].sub_(mean).div_(std)
    last.bias[half:].sub_(2 * std.log())
    logger.info("latent channels had mean %s, deviation %s", mean.tolist(), std.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--crop-share", type=float, default=0.62, help="share of the time spent on crops")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--kl", type=float, default=2e-5)
    parser.add_argument("--noise", type=float, default=0.15, help="largest latent noise, in deviations")
    parser.add_argument("--clips", type=int, default=4000, help="clips behind the pool of frames")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    pool = frame_pool(training_specs(), args.clips, args.seed)
    test = frame_pool([spec for spec in all_specs() if held_out(spec)], 128, args.seed + 1, per_clip=2)
    points = outline_points(pool)
    vae = build_vae().to(memory_format=torch.channels_last)
    ema = Ema(vae)
    state_path, folded, step, spent = args.out / "state.pt", False, 0, 0.0
    opts = optimizers(vae, args.lr, outer=("conv_in", "encoder.conv_out", "decoder.conv_out"))
    if state_path.exists():
        state = torch.load(state_path)
        vae.load_state_dict(state["vae"])
        ema.load_state_dict(state["ema"])
        for opt, saved in zip(opts, state["opts"], strict=True):
            opt.load_state_dict(saved)
        folded, step, spent = state["folded"], state["step"], state["spent"]
    clock, saved_at, squared = Clock(args.minutes, spent), spent, 0.0

    def save_state() -> None:
        state = {
            "vae": vae.state_dict(),
            "ema": ema.state_dict(),
            "opts": [opt.state_dict() for opt in opts],
            "folded": folded,
            "step": step,
            "spent": clock.spent,
        }
        atomically(state_path, lambda path: torch.save(state, path))

    averaged = build_vae().to(memory_format=torch.channels_last)
    bar = tqdm(total=100, desc="vae", mininterval=20, bar_format="{l_bar}{bar}| {elapsed} {postfix}")
    while (progress := clock.progress) < 1:
        if progress > args.crop_share and not folded:
            ema.copy_to(vae)
            standardise(vae, pool[torch.randperm(len(pool))[:1024]])
            ema, folded = Ema(vae), True
        lr = args.lr * min(1, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * progress))
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = lr
        batch = pool[torch.randint(len(pool), (16,))] if folded else crops(pool, points, 32)
        loss, error = loss_of(vae, to_input(batch), args.kl, args.noise)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        ema.update(vae)
        step += 1
        squared = error if step == 1 else 0.98 * squared + 0.02 * error
        if step % 200 == 0:
            ema.copy_to(averaged)
            db = psnr(averaged, test)
            row = {
                "step": step,
                "minutes": round(clock.spent / 60, 2),
                "lr": f"{lr:.2e}",
                "mse": f"{squared:.5f}",
                "test_psnr": round(db, 2),
            }
            log_row(args.out / "log.csv", row)
            bar.n = round(100 * progress)
            bar.set_postfix_str(f"step {step} mse {squared:.5f} test {db:.2f} dB")
        if clock.spent - saved_at > 120:
            saved_at = clock.spent
            save_state()
    bar.close()
    save_state()

    ema.copy_to(vae)
    latents = encode(vae, pool[torch.randperm(len(pool))[:2048]])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    vae.half().save_pretrained(args.out / "model")
    rounded = AutoencoderKL.from_pretrained(args.out / "model").to(memory_format=torch.channels_last)
    print(
        f"{step} steps, {clock.spent / 60:.1f} minutes, scaling {vae.config.scaling_factor}, "
        f"held-out PSNR {psnr(rounded.float(), test):.2f} dB"
    )


if __name__ == "__main__":
    main()
