"""Train the bundled model's transformer and text encoder on pre-encoded clips, by flow matching.

The schedule is a function of wall-clock time, because the end is a hard wall: warm-up, constant, then linear
to 0. On the CPU, worker threads with one core each take micro-batches from a shared queue; unlike threads
inside every operation this stays fast when another program takes half a core. It resumes when started again.

    python -m demos.bundled_model.train_transformer --vae runs/vae/model --out runs/t2v
"""

from __future__ import annotations

import argparse
import copy
import logging
import queue
import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from torch import Tensor, nn
from tqdm import tqdm

from demos.bundled_model.clips import FRAMES, ClipSpec, all_specs, caption, held_out, render, training_specs
from demos.bundled_model.common import Clock, Ema, atomically, contact_sheet, log_row
from demos.bundled_model.model import (
    LATENT_CHANNELS,
    LATENT_SIDE,
    TextConditioner,
    assemble,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    encode_mean,
    load_vae,
    noise_like,
    padded_lengths,
    parameters,
    sample_sigmas,
    share_text,
)
from demos.bundled_model.optim import optimizers

logger = logging.getLogger(__name__)
WARMUP_STEPS, DECAY_SHARE = 100, 0.3
OUTER = ("pos_embed", "proj_out", "adaln", "scale_shift_table", "shared", "relative_attention_bias")
SHOWN = (
    "a large red circle moving right on a black background",
    "a small blue square moving up on stripes",
    "a large green triangle circling on a checkerboard",
    "a big yellow star growing on a grey gradient",
    "a large purple ring standing still on a white background",
    "a small cyan cross moving left on black",
    "a red circle moving right",
    "a large orange triangle moving down on a checkerboard",
)


class T2V(nn.Module):
    """What is trained: text encoder and transformer, called the way the pipeline calls them."""

    def __init__(self, conditioner: TextConditioner, transformer: nn.Module) -> None:
        super().__init__()
        self.conditioner, self.transformer = conditioner, transformer

    def forward(self, noisy: Tensor, sigma: Tensor, ids: Tensor, mask: Tensor, padded: Tensor) -> Tensor:
        text, offsets = self.conditioner(ids, mask, padded)
        return self.transformer(
            noisy, timestep=1000 * sigma, encoder_hidden_states=text, encoder_attention_mask=offsets, return_dict=False
        )[0]


def encode_clips(
    vae: AutoencoderKL, path: Path, clips: int, seed: int, workers: int
) -> tuple[np.memmap, list[ClipSpec]]:
    """Latents [N, C, T, H, W] of random training clips, encoded once into a memory-mapped fp16 file."""
    every = training_specs()
    specs = every * (clips // len(every)) + random.Random(seed).sample(every, clips % len(every))
    shape = (clips, LATENT_CHANNELS, FRAMES, LATENT_SIDE, LATENT_SIDE)
    if not path.exists():

        def write(partial: Path) -> None:
            latents = np.memmap(partial, np.float16, "w+", shape=shape)

            def one(start: int) -> None:
                batch = render(specs[start : start + 8], seed * 1_000_003 + start)
                with torch.inference_mode():
                    encoded = torch.stack([encode_mean(vae, clip) for clip in batch])
                latents[start : start + len(batch)] = encoded.transpose(1, 2).half().numpy()

            starts = range(0, clips, 8)
            with ThreadPoolExecutor(workers) as pool:
                for _ in tqdm(pool.map(one, starts), total=len(starts), desc="encode", mininterval=10):
                    pass
            latents.flush()

        atomically(path, write)
    return np.memmap(path, np.float16, "r", shape=shape), specs


def training_caption(spec: ClipSpec, rng: random.Random) -> str:
    """A random wording; one in eight is empty, a few contain a word the tokenizer does not know."""
    if rng.random() < 0.12:
        return ""
    words = caption(spec, rng).split()
    if rng.random() < 0.03:
        words.insert(rng.randrange(len(words) + 1), "xyzzy")
    return " ".join(words)


class Workers:
    """Gradients of one batch, computed by threads that share the weights and a queue of micro-batches."""

    def __init__(self, model: T2V, count: int) -> None:
        self.model = model
        self.replicas = [copy.deepcopy(model) for _ in range(count)]
        for replica in self.replicas:
            for mine, shared in zip(replica.parameters(), model.parameters(), strict=True):
                mine.data = shared.data

    def backward(self, batches: Sequence[dict[str, Tensor]]) -> float:
        """Accumulate the mean gradient into the model's `.grad` and return the mean loss."""
        todo: queue.SimpleQueue[dict[str, Tensor]] = queue.SimpleQueue()
        for batch in batches:
            todo.put(batch)
        losses: list[float] = []

        def work(replica: T2V) -> None:
            while True:
                try:
                    batch = dict(todo.get_nowait())
                except queue.Empty:
                    return
                target = batch.pop("target")
                loss = (replica(**batch) - target).square().mean() / len(batches)
                loss.backward()
                losses.append(loss.item())

        threads = [threading.Thread(target=work, args=(replica,)) for replica in self.replicas[1:]]
        for thread in threads:
            thread.start()
        work(self.replicas[0])
        for thread in threads:
            thread.join()
        if len(losses) != len(batches):
            raise RuntimeError("a worker failed; its traceback is above")
        for params in zip(self.model.parameters(), *(r.parameters() for r in self.replicas), strict=True):
            grads = [p.grad for p in params[1:] if p.grad is not None]
            params[0].grad = torch.stack(grads).sum(0) if len(grads) > 1 else (grads[0] if grads else None)
            for p in params[1:]:
                p.grad = None
        return sum(losses)


def learning_rate(step: int, progress: float) -> float:
    """Share of the top learning rate."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (1 - progress) / DECAY_SHARE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=80, help="of training, encoding excluded")
    parser.add_argument("--clips", type=int, default=7560, help="clips to encode")
    parser.add_argument("--layers", type=int, default=6, help="spatial blocks, and as many temporal ones")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--shift", type=float, default=3.0, help="of noise levels, here and in sampling")
    parser.add_argument("--guidance", type=float, default=4.0, help="for the contact sheets")
    parser.add_argument("--sheet-minutes", type=float, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    accelerator = Accelerator(cpu=True)
    set_seed(args.seed)

    vae = load_vae(args.vae)
    torch.set_num_threads(1)  # the workers are the threads
    latents, specs = encode_clips(vae, args.out / "latents.f16", args.clips, args.seed, args.workers)
    tokenizer = build_tokenizer()
    model = T2V(
        TextConditioner(build_text_encoder(tokenizer)),
        share_text(build_transformer(args.layers, args.heads, args.head_dim)),
    )
    logger.info(
        "transformer %.2f M, text %.2f M parameters", parameters(model.transformer), parameters(model.conditioner)
    )
    ema = Ema(model)
    opts = optimizers(model, args.lr, weight_decay=0.01, outer=OUTER)
    tops = [args.lr, args.lr / 2]
    state_path, step, spent = args.out / "state.pt", 0, 0.0
    if state_path.exists():
        state = torch.load(state_path)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for opt, saved in zip(opts, state["opts"], strict=True):
            opt.load_state_dict(saved)
        step, spent = state["step"], state["spent"]
        set_seed(args.seed + step)
    model, *opts = accelerator.prepare(model, *opts)
    workers = Workers(model, args.workers)
    rng = random.Random(args.seed + step)
    clock, saved_at, sheet_at, average = Clock(args.minutes, spent), spent, spent, 0.0

    def batches_of(source: Tensor, captions: list[str]) -> list[dict[str, Tensor]]:
        sigma = sample_sigmas(len(source), args.shift)
        noisy, target = noise_like(source, sigma)
        tokens = tokenizer(captions, padding=True, return_tensors="pt")
        padded = padded_lengths(tokens.attention_mask.sum(1))
        whole = {
            "noisy": noisy,
            "target": target,
            "sigma": sigma,
            "ids": tokens.input_ids,
            "mask": tokens.attention_mask,
            "padded": padded,
        }
        split = {name: tensor.split(args.micro) for name, tensor in whole.items()}
        return [dict(zip(split, parts, strict=True)) for parts in zip(*split.values(), strict=True)]

    def save_state() -> None:
        state = {
            "model": model.state_dict(),
            "ema": ema.state_dict(),
            "step": step,
            "spent": clock.spent,
            "opts": [opt.state_dict() for opt in opts],
        }
        atomically(state_path, lambda path: torch.save(state, path))

    def pipeline() -> object:
        transformer = build_transformer(args.layers, args.heads, args.head_dim)
        averaged = T2V(TextConditioner(build_text_encoder(tokenizer)), transformer)
        ema.copy_to(averaged)
        return assemble(vae, tokenizer, averaged.conditioner.text_encoder, transformer, args.shift)

    def show() -> None:
        torch.set_num_threads(args.workers)
        frames = pipeline()(
            list(SHOWN),
            height=64,
            width=64,
            num_inference_steps=20,
            guidance_scale=args.guidance,
            clean_caption=False,
            output_type="pt",
            generator=torch.Generator().manual_seed(1),
        ).frames
        torch.set_num_threads(1)
        contact_sheet(args.out / f"sheet-{step:06d}.png", list(zip(SHOWN, frames, strict=True)))

    unseen = [spec for spec in all_specs() if held_out(spec)]
    probe_specs = random.Random(1).sample(unseen, 16) + random.Random(2).sample(training_specs(), 16)
    with torch.no_grad():
        clips = render(probe_specs, 987_654)
        probe = encode_mean(vae, clips.flatten(0, 1)).unflatten(0, clips.shape[:2]).transpose(1, 2)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        probes = batches_of(probe, [caption(spec) for spec in probe_specs])

    @torch.no_grad()
    def probe_loss() -> float:
        averaged = T2V(
            TextConditioner(build_text_encoder(tokenizer)),
            share_text(build_transformer(args.layers, args.heads, args.head_dim)),
        )
        ema.copy_to(averaged)
        errors = [
            (averaged(**{k: v for k, v in b.items() if k != "target"}) - b["target"]).square().mean() for b in probes
        ]
        return torch.stack(errors).mean().item()

    bar = tqdm(total=100, desc="t2v", mininterval=20, bar_format="{l_bar}{bar}| {elapsed} {postfix}")
    order: list[int] = []
    while (progress := clock.progress) < 1:
        for opt, top in zip(opts, tops, strict=True):
            for group in opt.param_groups:
                group["lr"] = top * learning_rate(step, progress)
        if len(order) < args.batch:
            order = rng.sample(range(args.clips), args.clips)
        rows, order = order[: args.batch], order[args.batch :]
        source = torch.from_numpy(latents[rows].astype(np.float32))
        loss = workers.backward(batches_of(source, [training_caption(specs[row], rng) for row in rows]))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        torch.set_num_threads(args.workers)  # Newton-Schulz: few, large, evenly split products
        for opt in opts:
            opt.step()
            opt.zero_grad()
        torch.set_num_threads(1)
        ema.update(model)
        step += 1
        average = loss if average == 0 else 0.98 * average + 0.02 * loss
        if step % 50 == 0:
            rate = args.batch * step / clock.spent
            row = {
                "step": step,
                "clips": step * args.batch,
                "minutes": round(clock.spent / 60, 2),
                "lr": f"{opts[0].param_groups[0]['lr']:.2e}",
                "loss": f"{average:.5f}",
                "probe": f"{probe_loss():.5f}",
                "clips_per_s": round(rate, 1),
            }
            log_row(args.out / "log.csv", row)
            bar.n = round(100 * progress)
            bar.set_postfix_str(f"step {step} loss {average:.4f} {rate:.1f} clips/s")
        if clock.spent - saved_at > 180:
            saved_at = clock.spent
            save_state()
        if clock.spent - sheet_at > 60 * args.sheet_minutes:
            sheet_at = clock.spent
            show()
            pipeline().save_pretrained(args.out / "preview")
    bar.close()
    save_state()
    show()
    final = pipeline()
    for component in (final.transformer, final.vae):  # T5 would load as fp16 and clash
        component.half()
    final.save_pretrained(args.out / "pipeline")
    print(f"{step} steps, {step * args.batch} clips, {clock.spent / 60:.1f} minutes, loss {average:.4f}")


if __name__ == "__main__":
    main()
