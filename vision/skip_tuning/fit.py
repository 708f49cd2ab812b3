"""The training loop: epochs of steps on cached prefixes, in one process or several, and a report of what it cost."""

from __future__ import annotations

import math
import os
import random
import time
from typing import Any

import torch
from torch.nn.utils import get_total_norm

from skipguide.errors import SkipError
from skipguide.hosts.progress import progress_bar, say
from skipguide.vision.skip_tuning.checkpoint import Checkpoint
from skipguide.vision.skip_tuning.config import TuneConfig
from skipguide.vision.skip_tuning.exactness import check_exact
from skipguide.vision.skip_tuning.inputs import Examples
from skipguide.vision.skip_tuning.optimizer import make_optimizer, set_rates
from skipguide.vision.skip_tuning.options import RunOptions
from skipguide.vision.skip_tuning.precision import autocast, pick_precision
from skipguide.vision.skip_tuning.prefixes import ImagePrefixes
from skipguide.vision.skip_tuning.results import TuneReport
from skipguide.vision.skip_tuning.samplers import class_batches, few_shot, random_batches
from skipguide.vision.skip_tuning.step import StepModule
from skipguide.vision.skip_tuning.trainable_classifier import TrainableClassifier


def train(tuner: TrainableClassifier, examples: Examples, config: TuneConfig, options: RunOptions) -> TuneReport:
    """Train `tuner` on `examples`; what `SkipTuner.fit` calls."""
    began = time.perf_counter()
    accelerator = options.accelerator or _launched()
    main = accelerator is None or accelerator.is_main_process
    if accelerator is not None and not _same(accelerator.device, tuner.device):
        raise SkipError(
            f"expected the tuner on this process's device; it is on {tuner.device}, accelerate gave "
            f"{accelerator.device}: pass SkipTuner(..., device=accelerator.device)"
        )
    examples.require_every_class()
    if config.shots is not None:
        examples = examples.subset(few_shot(examples.labels, config.shots, config.seed))
    check_finite(tuner)
    if tuner.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(tuner.device)
    dtype = pick_precision(config.precision, tuner.device)
    prefixes = ImagePrefixes(tuner, examples, config, options, dtype)
    checkpoint = Checkpoint(tuner, config, examples, options) if options.checkpoint_dir is not None else None
    texts = tuner.text_prefix()
    text_seconds = time.perf_counter() - began
    exactness = check_exact(tuner, prefixes, texts)
    step = StepModule(tuner.towers, texts, tuner.image_layer, tuner.text_layer, tuner.class_skip, config.seed)
    optimizer = make_optimizer(tuner, config)
    start, losses = checkpoint.load(optimizer) if checkpoint is not None else (0, [])
    scaler = torch.amp.GradScaler("cuda") if dtype == torch.float16 and tuner.device.type == "cuda" else None
    module = step if accelerator is None or accelerator.num_processes == 1 else accelerator.prepare(step)
    steps, kept = 0, 0
    held = 0
    tuner.forget_answers()  # before the first step: a run may be stopped
    epochs = progress_bar(range(start, config.epochs), "epochs", show=options.progress and main)
    for epoch in epochs:
        set_rates(optimizer, config, epoch)
        step.generator.manual_seed((config.seed * 1_000_003 + epoch) % 2**64)
        if main or accelerator is None or config.cache != "disk":
            cache = prefixes.cache(epoch)
        if accelerator is not None:
            accelerator.wait_for_everyone()
            cache = prefixes.cache(epoch)
        held = max(held, prefixes.bytes)
        total, count = 0.0, 0
        for batch in batches(examples.labels, config, epoch, accelerator):
            labels = torch.tensor([examples.labels[i] for i in batch], device=tuner.device)
            hidden = cache.rows(batch)
            with autocast(tuner.device, dtype):
                loss, _ = module(hidden if dtype != torch.float32 else hidden.float(), labels)
            (loss if scaler is None else scaler.scale(loss)).backward()
            value = loss.item()
            check_step(tuner, value, epoch, steps, scaled=scaler is not None)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad(set_to_none=True)
            total, count, steps, kept = total + value, count + 1, steps + 1, kept + len(step.kept)
        losses = [*losses, total / max(1, count)]
        say(epochs, f"loss {losses[-1]:.3f}")
        if checkpoint is not None and main:
            checkpoint.save(optimizer, epoch + 1, losses)
    check_finite(tuner)
    return TuneReport(
        seconds=time.perf_counter() - began,
        extraction_seconds=prefixes.seconds + text_seconds,
        peak_bytes=_peak(tuner.device),
        peak_kind="max_memory_allocated" if tuner.device.type == "cuda" else "peak resident set",
        cache_bytes=held + texts.hidden.numel() * texts.hidden.element_size(),
        trained=sum(p.numel() for p in tuner.parameters().values()),
        total=sum(p.numel() for p in tuner.model.parameters()),
        steps=steps,
        classes=len(tuner.classnames),
        kept=kept / max(1, steps),
        losses=tuple(losses),
        exactness=exactness,
        resumed_from=start,
    )


def batches(labels: list[int], config: TuneConfig, epoch: int, accelerator: Any) -> list[list[int]]:
    """The batches of one epoch for this process, equally many on every process."""
    rng = random.Random(config.seed * 1_000_003 + epoch)
    if config.one_class_batches():
        every = class_batches(labels, config.batch_size, rng)
    else:
        every = random_batches(len(labels), config.batch_size, rng)
    if accelerator is None or accelerator.num_processes == 1:
        return every
    share = len(every) // accelerator.num_processes
    if not share:
        raise SkipError(f"expected a batch for each of {accelerator.num_processes} processes; got {len(every)}")
    return every[accelerator.process_index :: accelerator.num_processes][:share]


def check_step(tuner: TrainableClassifier, loss: float, epoch: int, steps: int, *, scaled: bool) -> None:
    """Raise a `SkipError` for a loss or gradients that are not finite, with the weights as they are.

    After `backward`: there every process gets the others' gradients, so that none goes on and waits for one that
    stopped. A gradient scaler looks at scaled gradients itself, and leaves such steps out. By the gradients' 2-norm, as
    `clip_grad_norm_` does: the largest of them takes the CPU three times as long as the optimizer's step.
    """
    gradients = [p.grad for p in tuner.parameters().values() if p.grad is not None]
    if math.isfinite(loss) and (scaled or math.isfinite(float(get_total_norm(gradients)))):
        return
    for parameter in tuner.parameters().values():
        parameter.grad = None
    what = "gradients whose norm is not finite" if math.isfinite(loss) else f"a loss of {loss}"
    raise SkipError(
        f"expected a finite loss and finite gradients; epoch {epoch} has {what} after {steps} steps, whose weights are "
        f"kept: lower lr_text and lr_image"
    )


def check_finite(tuner: TrainableClassifier) -> None:
    """Raise a `SkipError` for weights that are not finite."""
    for name, parameter in tuner.parameters().items():
        if not bool(torch.isfinite(parameter).all()):
            raise SkipError(f"expected finite weights; {name} has others: lower the learning rates, or check the model")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _same(one: torch.device, other: torch.device) -> bool:
    """Whether two names mean one device: there is one CPU, and a GPU without a number is the current one."""
    if one.type != other.type or one.type != "cuda":
        return one.type == other.type
    return len({d.index if ":" in str(d) else torch.cuda.current_device() for d in (one, other)}) == 1


def _launched() -> Any:
    count = os.environ.get("WORLD_SIZE") or "1"
    if not count.isdecimal() or int(count) < 1:
        raise SkipError(f"expected WORLD_SIZE as the number of processes, from 1 on; got {count!r}: unset it")
    if int(count) == 1:
        return None
    from accelerate import Accelerator

    return Accelerator()
