"""The training loop: cached prefixes, steps, checkpoints, several processes, and an honest report."""

from __future__ import annotations

import logging
import math
import os
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from skipguide.errors import SkipError
from skipguide.files import replacing
from skipguide.vision.skip_tuning.cache import FeatureCache, cache_key, place_for
from skipguide.vision.skip_tuning.config import TuneConfig
from skipguide.vision.skip_tuning.inputs import Examples
from skipguide.vision.skip_tuning.results import TuneReport
from skipguide.vision.skip_tuning.samplers import class_batches, few_shot, random_batches
from skipguide.vision.skip_tuning.schedule import learning_rate
from skipguide.vision.skip_tuning.step import StepModule, TextPrefix

if TYPE_CHECKING:
    from skipguide.vision.skip_tuning.tuner import SkipTuner

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class RunOptions:
    """What a run needs beside its settings: places and objects, which are no JSON.

    Attributes:
        cache_dir: folder of caches on disk.
        cache_refresh: compute a cache on disk anew.
        checkpoint_dir: folder of the checkpoint; None keeps none.
        accelerator: an `accelerate.Accelerator`; None makes one if several processes were launched.
        progress: show progress bars.
        transform: augments one image (PIL, or prepared pixels) before it is prepared; drawn anew for every view.
    """

    cache_dir: str | Path | None = None
    cache_refresh: bool = False
    checkpoint_dir: str | Path | None = None
    accelerator: Any = None
    progress: bool = True
    transform: Callable[[Any], Any] | None = None


def pick_precision(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of the computation; the trained weights are fp32 in any case."""
    if wanted == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[wanted]


class ImagePrefixes:
    """Prefix features of the training images, one cache per view."""

    def __init__(
        self, tuner: SkipTuner, examples: Examples, config: TuneConfig, options: RunOptions, dtype: torch.dtype
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


def autocast(device: torch.device, dtype: torch.dtype) -> Any:
    """Autocast to `dtype`, or nothing for fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def _crop(item: Any, size: int) -> Any:
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(size, scale=(0.08, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.RandomHorizontalFlip()(crop(item))


@torch.no_grad()
def check_exact(tuner: SkipTuner, prefixes: ImagePrefixes, texts: TextPrefix) -> float:
    """Compare the resumed passes with the model's own on two images and two texts.

    Returns:
        The largest difference relative to the features.

    Raises:
        SkipError: if a resumed pass is not what the model computes.
    """
    worst = 0.0
    tokens, where = tuner.tokens()
    some = sorted({0, min(1, len(prefixes.examples) - 1)})
    pixels = torch.stack([prefixes.pixels(i, 0) for i in some]).to(tuner.device)
    wide = torch.zeros(len(some), dtype=torch.long, device=tuner.device)
    own = next(tuner.pretrained.parameters()).dtype
    compute = prefixes.compute if own == torch.float32 else own
    low = compute != torch.float32
    hidden = tuner.towers.image.prefix(tuner.cast(pixels), tuner.image_layer)
    pairs = [
        (
            tuner.towers.image.full,
            tuner.cast(pixels),
            tuner.towers.image.suffix(hidden.float(), wide, tuner.image_layer),
        ),
        (tuner.towers.text.full, tokens[:2], tuner.towers.text.suffix(texts.hidden[:2], where[:2], tuner.text_layer)),
    ]
    for full, inputs, resumed in pairs:
        with autocast(tuner.device, compute):
            whole = full(inputs).float()
        error = ((resumed.float() - whole).abs().max() / whole.abs().max().clamp(min=1e-12)).item()
        worst = max(worst, error)
        if not error <= (5e-2 if low else 1e-3):
            raise SkipError(
                f"expected the resumed pass to equal the model's own; they differ by {error:.2g} of the features: "
                "the model's forward does something that its towers do not describe"
            )
    return worst


def run(tuner: SkipTuner, examples: Examples, config: TuneConfig, options: RunOptions) -> TuneReport:
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
    tuner._changed()  # before the first step: a run may be stopped
    epochs = tqdm(range(start, config.epochs), "epochs", disable=not (options.progress and main), leave=False)
    for epoch in epochs:
        set_rates(optimizer, config, epoch)
        step.generator.manual_seed(config.seed * 1_000_003 + epoch)
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
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad(set_to_none=True)
            value = loss.item()
            if not math.isfinite(value):
                raise SkipError(
                    f"expected a finite loss; epoch {epoch} has {value} after {steps} steps: lower lr_text and lr_image"
                )
            total, count, steps, kept = total + value, count + 1, steps + 1, kept + len(step.kept)
        losses = [*losses, total / max(1, count)]
        epochs.set_postfix(loss=f"{losses[-1]:.3f}")
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


def make_optimizer(tuner: SkipTuner, config: TuneConfig) -> torch.optim.Optimizer:
    """One group per tower, text first."""
    image = {id(p) for p in tuner.towers.image.trained(0)}
    groups = [
        {"params": [p for p in tuner.parameters().values() if id(p) not in image], "tower": "text"},
        {"params": [p for p in tuner.parameters().values() if id(p) in image], "tower": "image"},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=config.weight_decay)
    return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, weight_decay=config.weight_decay)


def set_rates(optimizer: torch.optim.Optimizer, config: TuneConfig, epoch: int) -> None:
    """Set the learning rates of an epoch."""
    for group in optimizer.param_groups:
        peak = config.lr_text if group["tower"] == "text" else config.lr_image
        group["lr"] = learning_rate(
            epoch, config.epochs, peak, warmup_epochs=config.warmup_epochs, warmup=config.warmup_lr
        )


def check_finite(tuner: SkipTuner) -> None:
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
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import Accelerator

    return Accelerator()


class Checkpoint:
    """The state after the last whole epoch, in one file that is replaced at once."""

    def __init__(self, tuner: SkipTuner, config: TuneConfig, examples: Examples, options: RunOptions) -> None:
        self.tuner = tuner
        self.file = Path(str(options.checkpoint_dir)) / "checkpoint.pt"
        self.about = {
            "config": config.to_dict(),
            "model": tuner.fingerprint,
            "names": list(tuner.names),
            "classnames": list(tuner.classnames),
            "class_skip": None if tuner.class_skip is None else tuner.class_skip.to_dict(),
            "templates": list(tuner.templates),
            "preprocessing": tuner.prepare.name,
            "labels": list(examples.labels),
        }

    def save(self, optimizer: torch.optim.Optimizer, epoch: int, losses: list[float]) -> None:
        """Write the state after `epoch` epochs."""
        state = {
            "about": self.about,
            "epoch": epoch,
            "losses": losses,
            "weights": {name: p.detach().cpu() for name, p in self.tuner.parameters().items()},
            "optimizer": optimizer.state_dict(),
        }
        with replacing(self.file) as (partial,):
            torch.save(state, partial)

    def load(self, optimizer: torch.optim.Optimizer) -> tuple[int, list[float]]:
        """Go on from the file if it is there: the epoch to start with, and the losses so far."""
        if not self.file.exists():
            return 0, []
        try:
            state = torch.load(self.file, map_location=self.tuner.device, weights_only=True)
        except Exception as error:
            raise SkipError(f"expected a checkpoint in {self.file}; it is damaged ({error}): delete it") from error
        differs = [key for key in self.about if state["about"].get(key) != self.about[key]]
        if differs:
            raise SkipError(
                f"expected a checkpoint of this run in {self.file}; its {', '.join(differs)} differ: delete it, or "
                "choose another checkpoint_dir"
            )
        self.tuner._load(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        log.info("going on after epoch %d of %s", state["epoch"], self.file)
        return state["epoch"], list(state["losses"])
