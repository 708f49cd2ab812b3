"""Sampling: the clips of one setting and seed with the stock pipeline, fast on one thread, and what they took."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import skipguide.pipelines
from demos.bundled_model.clips import ClipSpec, caption
from demos.bundled_model.evaluate import choose
from demos.quality.controls import added, random_direction, weak_direction
from demos.quality.settings import LAYER, LAYERS, STEPS, Setting
from skipguide.assets import bundled
from skipguide.pipelines import Guide, SpatiotemporalSkipGuidance
from skipguide.pipelines.bundled import call_of

PROMPT_SEED = 31_000


def prompts(number: int, each: int, draw: int = 0) -> list[ClipSpec]:
    """`number` combinations, one in five held out of training, each repeated: a clip's place is its number."""
    unseen, seed = number // 5, PROMPT_SEED + draw
    specs = choose(number - unseen, seed, unseen=False) + choose(unseen, seed, unseen=True)
    return [spec for spec in specs for _ in range(each)]


def load(folder: Path) -> DiffusionPipeline:
    """A pipeline without bars."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def guide_of(name: str, settings: dict[str, Any]) -> Any:
    """A guidance of ours by its class, or a `Guide` around one of diffusers."""
    own = getattr(skipguide.pipelines, name, None)
    return own(**settings) if own is not None else Guide(getattr(diffusers, name)(**settings))


@dataclass(frozen=True)
class Clips:
    """Clips [N, T, 3, 64, 64] in [0, 1], their cost in blocks relative to plain CFG, and processor seconds each."""

    pixels: Tensor
    cost: float
    seconds: float
    stats: dict[str, Any]


class Sampler:
    """Makes clips; clip i of a seed starts from the same noise in every setting.

    The pipeline pads every prompt to one length, so any of them share a batch as if each were alone.

    Args:
        model: folder of the pipeline.
        weak: folder of an early checkpoint, for autoguidance.
        layer: that the random control takes the norm from.
        batch: clips at a time.
    """

    def __init__(self, model: Path | None = None, weak: Path | None = None, layer: int = LAYER, batch: int = 8) -> None:
        self.pipe = load(model or bundled())
        self.weak_folder = weak
        self.layer, self.batch = layer, batch
        call = call_of(model or bundled(), type(self.pipe))
        self.call = {k: v for k, v in call.items() if k not in ("num_inference_steps", "guidance_scale")}
        self._texts: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    @cached_property
    def weak(self) -> DiffusionPipeline:
        """The early checkpoint."""
        if self.weak_folder is None:
            raise FileNotFoundError("autoguidance needs --weak FOLDER (see demos/quality/README.md)")
        return load(self.weak_folder)

    @torch.no_grad()
    def text(self, pipe: DiffusionPipeline, prompt: str) -> tuple[Tensor, Tensor]:
        """Embeddings of a prompt and of its negative one, as the pipeline makes them for a single prompt."""
        key = (id(pipe), prompt)
        if key not in self._texts:
            how = {"do_classifier_free_guidance": True, "negative_prompt": ""} | self.call
            taken = inspect.signature(pipe.encode_prompt).parameters
            self._texts[key] = pipe.encode_prompt(prompt, **{k: v for k, v in how.items() if k in taken})
        return self._texts[key]

    def make(self, setting: Setting, specs: Sequence[ClipSpec], seed: int, steps: int | None = None) -> Clips:
        """All clips of one setting and seed."""
        words = [caption(spec) for spec in specs]
        batches = [range(at, min(at + self.batch, len(specs))) for at in range(0, len(specs), self.batch)]
        pixels: list[Tensor | None] = [None] * len(specs)
        began, stats, ran, own = time.process_time(), {}, 0.0, steps or setting.steps
        for batch in batches:
            seeds = [1_000_000 * (seed + 1) + i for i in batch]
            frames, stats = self._batch(setting, [words[i] for i in batch], seeds, own)
            for i, clip in zip(batch, frames, strict=True):
                pixels[i] = clip
            ran += stats["blocks_run"] if stats else len(batch) * own * self._blocks(setting)
        # relative to plain CFG at the usual number of steps, so that more steps cost more
        usual = 2 * LAYERS * (STEPS if steps is None else steps)
        cost = ran / (len(batches) if stats else len(specs)) / usual
        seconds = (time.process_time() - began) / len(specs)
        return Clips(torch.stack([clip for clip in pixels if clip is not None]), cost, seconds, stats)

    def _blocks(self, setting: Setting) -> int:
        """Blocks per clip and step without skip guidance."""
        if setting.control == "random":  # counted as what it stands for: a third pass from the layer on
            return 2 * LAYERS + LAYERS - 1 - self.layer
        return LAYERS * ((1 if setting.w <= 1 else 2) + (setting.control == "weak"))

    def _batch(
        self, setting: Setting, words: Sequence[str], seeds: Sequence[int], steps: int
    ) -> tuple[Tensor, dict[str, Any]]:
        texts = [self.text(self.pipe, prompt) for prompt in words]
        model = self.pipe.transformer
        drawn = {"seed": seeds[0]} if setting.guidance and setting.guidance.get("layers") == "stochastic" else {}
        guidance = SpatiotemporalSkipGuidance(**setting.guidance, **drawn) if setting.guidance else None
        passes = 2 if setting.w > 1 else 1
        if setting.control == "random":
            around: Any = added(model, random_direction(model, self.layer, seeds), setting.scale, passes)
        elif setting.control == "weak":
            weak_text = torch.cat([self.text(self.weak, prompt)[0] for prompt in words])
            around = added(model, weak_direction(self.weak.transformer, weak_text), setting.scale, passes)
        elif setting.guider is not None:
            around = guide_of(*setting.guider).apply(self.pipe)
        else:
            around = guidance.apply(self.pipe) if guidance else nullcontext()
        half = torch.autocast("cpu", torch.bfloat16, enabled=setting.precision == "bf16")
        with around as applied, half:
            frames = self.pipe(
                negative_prompt=None,
                prompt_embeds=torch.cat([own for own, _ in texts]),
                negative_prompt_embeds=torch.cat([other for _, other in texts]),
                num_inference_steps=steps,
                guidance_scale=setting.w,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="pt",
                **self.call,
            ).frames
        return frames.float(), applied.stats.to_dict() if guidance else {}
