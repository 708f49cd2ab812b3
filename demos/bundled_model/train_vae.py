"""Train the bundled model's autoencoder on pairs of neighbouring frames, and on frames alone.

Most steps see 32x32 crops around the shape's outline, which cost a quarter of a frame; the rest see
whole frames, as the attention in the middle sees other numbers of pixels there. One step in four shows frames alone,
as the first of a clip. It resumes from its own state when started again.

    python -m demos.bundled_model.train_vae --out runs/vae --steps 1800

A trained one may become better: all of it as long as a transformer has seen little of its latents (it follows within
minutes), later the decoder only, because the latents must stay what they are:

    python -m demos.bundled_model.train_vae --out runs/vae2 --start skipguide/assets/tiny-t2v/vae --steps 3000
    python -m demos.bundled_model.train_vae --out runs/vae3 --start skipguide/assets/tiny-t2v/vae --decoder-only
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from tqdm import tqdm

from demos.bundled_model.autoencoder import FRAMES, alone, as_images, build_vae, encode_frames, load_vae, to_input
from demos.bundled_model.clips import ClipSpec, all_specs, held_out, render, training_specs
from demos.bundled_model.common import Clock, Ema, atomically, log_row
from demos.bundled_model.crops import CROP, autoencoder_loss, crop_places, outline_points
from demos.bundled_model.optim import optimizers

logger = logging.getLogger(__name__)
OUTER = ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out", "quant_conv")
WARMUP_STEPS, DECAY_FROM = 50, 0.4


def pair_pool(specs: list[ClipSpec], clips: int, seed: int, per_clip: int = 3) -> Tensor:
    """Neighbouring frames that share a latent, uint8 `[clips * per_clip, 2, 3, 64, 64]`."""
    rng = random.Random(seed)
    pairs = []
    for start in tqdm(range(0, clips, 64), desc="frames", mininterval=5):
        batch = render(rng.choices(specs, k=min(64, clips - start)), seed * 1_000_003 + start, FRAMES)
        for clip in batch:
            firsts = [1 + 2 * k for k in rng.sample(range(FRAMES // 2), per_clip)]
            pairs.extend((clip[first : first + 2] * 255).round().to(torch.uint8) for first in firsts)
    return torch.stack(pairs)


def crops(pool: Tensor, points: Tensor, size: int) -> Tensor:
    """Random crops `[size, 2, 3, 32, 32]`, four in five around an outline, on the latent's grid of four pixels."""
    rows, corner = crop_places(points, size)
    cut = [pool[row, :, :, y : y + CROP, x : x + CROP] for row, (y, x) in zip(rows, corner.tolist(), strict=True)]
    return torch.stack(cut)


def loss_of(vae: AutoencoderKLWan, frames: Tensor, kl_weight: float, noise: float) -> tuple[Tensor, float]:
    """The loss of the video autoencoder on frames, with the squared error alone."""

    def decode(latent: Tensor) -> Tensor:
        return vae.decoder(vae.post_quant_conv(latent))  # type: ignore[no-any-return]

    return autoencoder_loss(*encode_frames(vae, frames), decode, frames, kl_weight, noise)


@torch.no_grad()
def psnr(vae: AutoencoderKLWan, pairs: Tensor) -> tuple[float, float]:
    """Peak signal to noise ratio in dB over uint8 pairs, and over their first frames alone."""
    found = []
    with as_images(vae):
        for single, frames in ((False, pairs.flatten(0, 1)), (True, pairs[:, 0])):
            alone(vae, single)
            errors = []
            for batch in frames.split(64):
                target = to_input(batch)
                decoded = vae.decoder(vae.post_quant_conv(encode_frames(vae, target)[0])).clamp(-1, 1)
                errors.append((decoded - target).square().mean((1, 2, 3)))
            found.append(10 * math.log10(4 / torch.cat(errors).mean().item()))
    return found[0], found[1]


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, pairs: Tensor) -> None:
    """Write the latents' means and deviations per channel into the configuration, where `WanPipeline` reads them."""
    with as_images(vae):
        alone(vae, False)
        latents = torch.cat([encode_frames(vae, to_input(p.flatten(0, 1)))[0] for p in pairs.split(64)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    vae.register_to_config(
        latents_mean=[round(v, 4) for v in mean.tolist()], latents_std=[round(v, 4) for v in std.tolist()]
    )


def export(ema: Ema, vae: AutoencoderKLWan, pool: Tensor, folder: Path, measured: bool) -> None:
    """The averaged weights in fp16, as the stock class reads them; the latents' statistics unless `measured` before."""
    ema.copy_to(vae)
    if not measured:
        measure_latents(vae, pool[torch.randperm(len(pool))[:512]])
    vae.half().save_pretrained(folder)
    vae.float()


def run(args: argparse.Namespace, vae: AutoencoderKLWan, averaged: AutoencoderKLWan) -> None:
    """Train `vae` in place; `averaged`, of the same shape, holds the average while it is measured."""
    pool = pair_pool(training_specs(), args.clips, args.seed)
    test = pair_pool([spec for spec in all_specs() if held_out(spec)], min(args.clips, 32), args.seed + 1, 1)
    points = outline_points(pool[:, 0])
    ema, state_path, step, spent = Ema(vae, 0.998), args.out / "state.pt", 0, 0.0
    if args.decoder_only:
        for module in (vae.encoder, vae.quant_conv):
            module.requires_grad_(False)
    opts = optimizers(vae, args.lr, outer=OUTER)
    if state_path.exists():
        state = torch.load(state_path)
        vae.load_state_dict(state["vae"])
        ema.load_state_dict(state["ema"])
        for opt, saved in zip(opts, state["opts"], strict=True):
            opt.load_state_dict(saved)
        step, spent = state["step"], state["spent"]
    clock, saved_at, shown_at, squared = Clock(1.0, spent), spent, 0.0, 0.0

    def save() -> None:
        state = {"vae": vae.state_dict(), "ema": ema.state_dict(), "opts": [opt.state_dict() for opt in opts]}
        state |= {"step": step, "spent": clock.spent}
        atomically(state_path, lambda path: torch.save(state, path))

    bar = tqdm(total=args.steps, initial=step, desc="vae", mininterval=20)
    while step < args.steps:
        progress = step / args.steps
        rate = args.lr * min(1, (step + 1) / WARMUP_STEPS, (1 - progress) / (1 - DECAY_FROM))
        for group in (group for opt in opts for group in opt.param_groups):
            group["lr"] = rate
        whole = progress > args.crop_share
        batch = pool[torch.randint(len(pool), (args.batch // 4,))] if whole else crops(pool, points, args.batch)
        single = step % 4 == 0
        with as_images(vae):
            alone(vae, single)
            frames = batch[:, random.randrange(2)] if single else batch.flatten(0, 1)
            loss, error = loss_of(vae, to_input(frames), args.kl, args.noise)
            loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        ema.update(vae)
        step += 1
        bar.update()
        squared = error if squared == 0 else 0.98 * squared + 0.02 * error
        if clock.spent - shown_at > 120:
            shown_at = clock.spent
            ema.copy_to(averaged)
            pairs, singles = psnr(averaged, test)
            row: dict[str, float | int | str] = {"step": step, "minutes": round(clock.spent / 60, 2)}
            row |= {"mse": f"{squared:.5f}", "pairs_dB": round(pairs, 2), "alone_dB": round(singles, 2)}
            log_row(args.out / "log.csv", row)
            bar.set_postfix_str(f"mse {squared:.5f} held out {pairs:.2f} and {singles:.2f} dB")
        if clock.spent - saved_at > 120:
            saved_at = clock.spent
            save()
            export(ema, averaged, pool, args.out / "model", args.decoder_only)
    bar.close()
    save()
    export(ema, averaged, pool, args.out / "model", args.decoder_only)
    rounded = AutoencoderKLWan.from_pretrained(args.out / "model", torch_dtype=torch.float32)
    pairs, singles = psnr(rounded, test)
    print(
        f"{step} steps, {clock.spent / 60:.1f} minutes, held out: pairs {pairs:.2f} dB, first frames {singles:.2f} dB"
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="folder of a trained one to go on from")
    parser.add_argument("--decoder-only", action="store_true", help="the encoder and the latents' statistics stay")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--crop-share", type=float, default=0.85, help="share of the steps spent on crops")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--kl", type=float, default=2e-5)
    parser.add_argument("--noise", type=float, default=0.15, help="largest latent noise, in deviations")
    parser.add_argument("--batch", type=int, default=16, help="pairs of crops; a quarter as many of whole frames")
    parser.add_argument("--clips", type=int, default=3000, help="clips behind the pool of frames")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.decoder_only and args.start is None:
        parser.error("--decoder-only needs --start FOLDER: the encoder that stays")
    return args


def main() -> None:
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    vae = build_vae() if args.start is None else load_vae(args.start).requires_grad_(True)
    run(args, vae, copy.deepcopy(vae))


if __name__ == "__main__":
    main()
