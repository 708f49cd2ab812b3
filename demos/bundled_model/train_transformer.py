"""Train the bundled model's transformer and text encoder by flow matching, over as many sessions as it takes.

The learning rate is constant and the average of the weights is what counts, so a run may end at any moment: SIGTERM or
Ctrl-C finishes the step and saves. `--decay-minutes` lets the last run come to rest. Started again with the same
`--out` it goes on to the bit but for the order of clips; on another machine it goes on from the pipeline that ships.

    python -m demos.bundled_model.train_transformer --vae runs/vae/model --out runs/t2v --minutes 600

With both cores, one process each, every process a share of the batch:

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m demos.bundled_model.train_transformer ...
"""

from __future__ import annotations

import argparse
import logging
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import WanPipeline
from torch import Tensor, nn
from transformers import T5Tokenizer

from demos.bundled_model.autoencoder import FRAMES, encode_clips, load_vae
from demos.bundled_model.clips import all_specs, caption, held_out, render, training_specs
from demos.bundled_model.common import Ema, atomically, contact_sheet, log_row
from demos.bundled_model.flow import noise_like, sample_sigmas
from demos.bundled_model.model import (
    SHIFT,
    SHORT,
    T2V,
    Shape,
    assemble,
    build,
    call,
    padded_lengths,
    stock_attention,
)
from demos.bundled_model.optim import optimizers
from demos.bundled_model.pool import ClipPool
from demos.bundled_model.progress import FOLDER, Progress, load_weights, read_progress, write_progress
from demos.bundled_model.team import Team
from demos.bundled_model.text import SHOWN, build_tokenizer, training_caption
from skipguide.errors import SkipError

logger = logging.getLogger(__name__)
OUTER = ("patch_embedding", "proj_out", "time_proj", "scale_shift_table", "shared", "relative_attention_bias")
WARMUP_STEPS = 100
EMA = 0.998


def batch_of(latents: Tensor, captions: list[str], tokenizer: T5Tokenizer) -> dict[str, Tensor]:
    """What one pass of `T2V` takes, and the velocity to predict as `target`."""
    sigma = sample_sigmas(len(latents), SHIFT)
    noisy, target = noise_like(latents, sigma)
    tokens = tokenizer(captions, padding=True, return_tensors="pt")
    return {
        "noisy": noisy,
        "target": target,
        "sigma": sigma,
        "ids": tokens.input_ids,
        "mask": tokens.attention_mask,
        "padded": padded_lengths(len(latents)),
    }


def backward(model: T2V, batch: dict[str, Tensor], micro: int) -> float:
    """Accumulate the mean gradient over micro-batches, which stay in the cache; returns the mean loss."""
    parts = {name: tensor.split(micro) for name, tensor in batch.items()}
    total = 0.0
    for values in zip(*parts.values(), strict=True):
        part = dict(zip(parts, values, strict=True))
        target = part.pop("target")
        loss = (model(**part) - target).square().mean() * (len(target) / len(batch["sigma"]))
        loss.backward()
        total += loss.item()
    return total


class Probe:
    """Loss of the averaged weights on clips, noise and captions that never change, half of them held out."""

    def __init__(self, vae: nn.Module, tokenizer: T5Tokenizer, each: int = 16) -> None:
        unseen = [spec for spec in all_specs() if held_out(spec)]
        specs = random.Random(1).sample(unseen, each) + random.Random(2).sample(training_specs(), each)
        latents = torch.cat([encode_clips(vae, render([spec], 987_654 + i, FRAMES)) for i, spec in enumerate(specs)])
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.batch = batch_of(latents, [caption(spec) for spec in specs], tokenizer)
        self.batch["padded"] = torch.full((2 * each,), SHORT)
        self.batch["sigma"] = (torch.arange(2 * each) % each + 0.5) / each  # every level in both halves
        self.batch["noisy"] = latents + self.batch["sigma"].view(-1, 1, 1, 1, 1) * self.batch["target"]

    @torch.no_grad()
    def loss(self, model: T2V) -> float:
        values = {name: tensor for name, tensor in self.batch.items() if name != "target"}
        return (model(**values) - self.batch["target"]).square().mean().item()


def pipeline(ema: Ema, shape: Shape, tokenizer: T5Tokenizer, vae: nn.Module) -> WanPipeline:
    """The stock pipeline with the averaged weights."""
    averaged = build(shape, tokenizer)
    ema.copy_to(averaged)
    return assemble(vae, tokenizer, averaged.text_encoder, stock_attention(averaged.transformer))


def show(pipe: WanPipeline, path: Path) -> None:
    """A contact sheet of the prompts that every sheet shows."""
    generator = torch.Generator().manual_seed(1)
    frames = pipe(list(SHOWN), output_type="pt", generator=generator, **call()).frames
    contact_sheet(path, list(zip(SHOWN, frames, strict=True)))


def asked_shape(args: argparse.Namespace, otherwise: Shape) -> Shape:
    """The sizes that were given, the others from `otherwise`."""
    named = {"layers": args.layers, "heads": args.heads, "head_dim": args.head_dim, "ffn": args.ffn}
    named |= {"patch": args.patch and tuple(args.patch)}
    return Shape.from_dict(otherwise.to_dict() | {name: value for name, value in named.items() if value is not None})


class Run:
    """One training: its model, optimisers, average and counters, and where they are kept."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out, self.team = args, args.out, Team()
        self.tokenizer = build_tokenizer()
        self.vae = load_vae(args.vae)
        self.state_path, self.file = args.out / "state.pt", args.out / "progress.safetensors"
        state = torch.load(self.state_path, weights_only=False) if self.state_path.exists() else None
        start = args.start if state is None and args.start is not None and args.start.exists() else None
        if state is not None:
            self.progress = Progress.from_dict(state["progress"])
        else:
            self.progress = read_progress(start) if start else Progress(asked_shape(args, Shape()))
        if (asked := asked_shape(args, self.progress.shape)) != self.progress.shape:
            raise SkipError(
                f"{self.state_path if state else start} holds a training of {self.progress.shape}; asked for {asked}: "
                "leave the sizes out to go on with it, or choose another --out and --fresh-start"
            )
        self.model = build(self.progress.shape, self.tokenizer, args.bf16)
        if start:
            load_weights(start, self.model)
        self.team.align(self.model)
        self.ema = Ema(self.model, EMA)
        self.ema.steps = self.progress.steps
        self.opts = optimizers(self.model, args.lr, weight_decay=0.01, outer=OUTER, bf16=args.bf16)
        self.warm = 0  # steps since momentum began
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            for opt, saved in zip(self.opts, state["opts"], strict=True):
                opt.load_state_dict(saved)
            self.warm = state["warm"]
        seed = args.seed + self.progress.steps + 1_000_003 * self.team.rank
        torch.manual_seed(seed)
        self.rng = random.Random(seed)
        folder = args.out if self.team.leads else args.out / f"rank{self.team.rank}"
        self.pool = ClipPool(self.vae, folder, args.pool, args.seed + self.team.rank, self.progress.encoded)
        millions = sum(param.numel() for param in self.model.parameters()) / 1e6
        logger.info("%s from step %d, %.2f M parameters", self.progress.shape, self.progress.steps, millions)

    def step(self, rate: float) -> float:
        """One optimiser step at a share of the top learning rate; returns the loss."""
        for opt in self.opts:
            for group in opt.param_groups:
                group["lr"] = self.args.lr * rate * min(1.0, (self.warm + 1) / WARMUP_STEPS)
        latents, specs = self.pool.draw(self.team.share(self.args.batch), self.rng)
        batch = batch_of(latents, [training_caption(spec, self.rng) for spec in specs], self.tokenizer)
        loss = backward(self.model, batch, self.args.micro)
        self.team.average_gradients(self.model, len(specs) / self.args.batch)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for opt in self.opts:
            opt.step()
            opt.zero_grad()
        self.ema.update(self.model)
        self.progress.steps += 1
        self.progress.clips += self.args.batch
        self.warm += 1
        self.pool.grow(self.args.fresh)
        self.progress.encoded = self.pool.next
        return loss

    def averaged(self) -> T2V:
        model = build(self.progress.shape, self.tokenizer)
        self.ema.copy_to(model)
        return model

    def save(self) -> None:
        """The whole state for this machine, and the small file that may be committed."""
        state = {"model": self.model.state_dict(), "ema": self.ema.state_dict(), "progress": self.progress.to_dict()}
        state |= {"opts": [opt.state_dict() for opt in self.opts], "warm": self.warm}
        self.pool.save()
        if not self.team.leads:
            return
        atomically(self.state_path, lambda path: torch.save(state, path))
        write_progress(self.file, self.ema, self.progress)


def train(run: Run) -> None:
    """Until the minutes are over or somebody stops it."""
    args, progress = run.args, run.progress
    run.pool.fill(args.first_clips)
    probe = Probe(run.vae, run.tokenizer, args.probe) if run.team.leads else None
    stop: list[int] = []
    before = {number: signal.signal(number, lambda *_: stop.append(1)) for number in (signal.SIGTERM, signal.SIGINT)}
    began = last = time.monotonic()
    processor = time.process_time()
    saved = shown = began
    first, average = progress.steps, 0.0
    try:
        while (left := run.team.go_on(0.0 if stop else args.minutes - (time.monotonic() - began) / 60)) > 0:
            if args.steps is not None and progress.steps - first >= args.steps:
                break
            loss = run.step(min(1.0, left / args.decay_minutes) if args.decay_minutes else 1.0)
            now = time.monotonic()
            progress.minutes, last = progress.minutes + (now - last) / 60, now
            average = loss if average == 0 else 0.98 * average + 0.02 * loss
            due = progress.steps % args.log_every == 0
            if due:
                run.team.align(run.model)
            if due and probe is not None:
                progress.probe = probe.loss(run.averaged())
                row: dict[str, float | int | str] = {"step": progress.steps, "clips": progress.clips}
                row |= {
                    "minutes": round(progress.minutes, 2),
                    "loss": f"{average:.5f}",
                    "probe": f"{progress.probe:.5f}",
                }
                made = args.batch * (progress.steps - first)
                row |= {"clips_per_s": round(made / (now - began), 1)}
                row |= {"clips_per_cpu_s": round(made / (time.process_time() - processor), 1)}
                log_row(args.out / "log.csv", row)
                logger.info("%s", row)
            if now - saved > 60 * args.save_minutes:
                saved = now
                run.save()
            if now - shown > 60 * args.sheet_minutes and run.team.leads:
                shown = now
                path = args.out / f"sheet-{progress.steps:06d}.png"
                show(pipeline(run.ema, progress.shape, run.tokenizer, run.vae), path)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    run.save()
    run.team.leave()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, default=FOLDER / "vae")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, default=FOLDER, help="where to go on from when --out holds no state")
    parser.add_argument("--fresh-start", dest="start", action="store_const", const=None, help="from nothing")
    parser.add_argument("--minutes", type=float, default=600, help="of this call")
    parser.add_argument("--steps", type=int, help="of this call, if it is to end before the minutes")
    parser.add_argument("--decay-minutes", type=float, default=0, help="the last so many bring the learning rate to 0")
    parser.add_argument("--layers", type=int, help=f"of a new training (default: {Shape.layers})")
    parser.add_argument("--heads", type=int, help=f"of a new training (default: {Shape.heads})")
    parser.add_argument("--head-dim", type=int, help=f"of a new training (default: {Shape.head_dim})")
    parser.add_argument("--ffn", type=int, help=f"of a new training (default: {Shape.ffn})")
    parser.add_argument("--patch", type=int, nargs=3, help=f"latents a token (default: {Shape.patch})")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--bf16", action="store_true", help="products of the blocks, on processors with AVX512_BF16")
    parser.add_argument("--pool", type=int, default=12_000, help="clips the ring holds")
    parser.add_argument("--first-clips", type=int, default=2520, help="encoded before the first step")
    parser.add_argument("--fresh", type=int, default=2, help="clips encoded with every step")
    parser.add_argument("--probe", type=int, default=16, help="clips of each kind behind the probe loss")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-minutes", type=float, default=4)
    parser.add_argument("--sheet-minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    try:
        run = Run(args)
    except SkipError as error:
        raise SystemExit(f"train: {error}") from None
    train(run)
    done = run.progress
    if run.team.leads:
        print(f"{done.steps} steps, {done.clips} clips, probe loss {done.probe:.4f}: {run.file}")


if __name__ == "__main__":
    main()
