"""Calibration: leave out every layer in turn, at a few steps of a plain run, and score what that changes."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skipguide.active import ActivePlan, Call, end_everywhere, hold_everywhere
from skipguide.arguments import batch_size
from skipguide.blocks import find_blocks
from skipguide.config import as_whole, native, write_json
from skipguide.errors import SkipError
from skipguide.files import read_json
from skipguide.gate import gate_of
from skipguide.hosts.cache_contexts import ContextNames
from skipguide.hosts.wrappers import unwrap
from skipguide.parts import RANKED
from skipguide.pipelines.registry.described import PipelineSpec, described_loop, pipeline_spec
from skipguide.pipelines.sampling.caches import refuse_caches
from skipguide.pipelines.sampling.call_stack import is_called_by
from skipguide.pipelines.sampling.grid import grid_of
from skipguide.pipelines.sampling.ledger import GuidanceStats
from skipguide.pipelines.sampling.passes import DenoiserPasses
from skipguide.pipelines.sampling.pipeline_call import PipelineCall
from skipguide.pipelines.sampling.predictions import first
from skipguide.plan import SkipPlan
from skipguide.select import DEFAULT_SCORE, LayerScore, LayerScores, average, fingerprint, measure_skip

PROMPTS = ("a red ball rolling over grass", "a woman walking along a street in the rain, filmed by hand")
STEPS, LEVELS = 8, 4
AT_ONCE = 8  # layers that are left out after one plain pass: an activation is held for each
logger = logging.getLogger(__name__)

Key = tuple[int, Any]  # layer and part


class _Listener:
    """Handles the denoiser's calls in a calibration run; what the pipeline gets is its plain prediction."""

    def __init__(self, pipe: Any, spec: PipelineSpec, model: nn.Module, keys: Sequence[Key], levels: int) -> None:
        self.pipe, self.spec, self.model, self.levels = pipe, spec, model, levels
        self.loop = described_loop(pipe)
        self.keys = keys
        self.state = PipelineCall()
        self.passes = DenoiserPasses(model, True, GuidanceStats())
        self.samples: dict[Key, list[dict[str, Tensor]]] = {key: [] for key in keys}
        self.waiting: tuple[Tensor, dict[Key, Tensor], Any] | None = None

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not is_called_by(self.pipe, self.model, self.loop) or self.spec.is_passive(kwargs):
            return call(*args, **kwargs)
        branch = self.state.enter(self.pipe, self.spec, ContextNames.name(self.model))
        if branch == "uncond":
            answer = call(*args, **kwargs)
            self.score_last_step(first(answer))
            return answer
        self.score_last_step(None)
        if self.state.step not in chosen_steps(self.state.steps, self.levels):
            return call(*args, **kwargs)
        batch = batch_size(args, kwargs)
        halves = [slice(0, batch // 2), slice(batch // 2, batch)]
        other, rows = halves[::-1] if self.spec.cond_first else halves
        rows = rows if branch == "both" else slice(0, batch)
        out: Any = None
        skipped: dict[Key, Tensor] = {}
        for part in _chunks(self.keys, AT_ONCE):
            step = self.passes.prepared([SkipPlan([layer], part=part_name) for layer, part_name in part])
            out = self.passes.plain(call, args, kwargs, batch, step=step)
            mine = self.passes.rows(args, kwargs, rows, batch)
            found = self.passes.skipped(step, call, *mine, rows, batch)
            skipped |= {key: found[SkipPlan([key[0]], part=key[1])] for key in part}
        c = first(out)[rows]
        self.waiting = c, skipped, grid_of(self.spec, kwargs, c)
        if branch == "both":
            self.score_last_step(first(out)[other])
        elif branch == "only":
            self.score_last_step(None)
        return out

    def score_last_step(self, u: Tensor | None) -> None:
        """Score the skipped predictions of the last step looked at; u is None where that step has no CFG."""
        if self.waiting is not None:
            c, skipped, grid = self.waiting
            self.waiting = None
            for key, k in skipped.items():
                self.samples[key].append(measure_skip(c, k, u, grid))

    def listen(self) -> None:
        """Start to handle the calls of the denoiser."""
        self.passes.install()
        hold_everywhere(gate_of(self.model), self)
        ContextNames.listen(self.model, self)

    def leave(self) -> None:
        """Stop, and leave the denoiser as it was."""
        end_everywhere(gate_of(self.model), self)
        ContextNames.leave(self.model, self)
        self.passes.remove()
        self.waiting = None


def _chunks(keys: Sequence[Key], layers: int) -> Iterator[list[Key]]:
    """The keys, so many layers at a time, which limits the activations that are held."""
    order = list(dict.fromkeys(layer for layer, _ in keys))
    for begin in range(0, len(order), layers):
        some = set(order[begin : begin + layers])
        yield [key for key in keys if key[0] in some]


def chosen_steps(steps: int, levels: int) -> tuple[int, ...]:
    """The steps at the middle of `levels` equal parts of a run."""
    return tuple(dict.fromkeys(min(steps - 1, int((i + 0.5) * steps / levels)) for i in range(levels)))


def calibrate(
    pipe: Any,
    prompts: Sequence[str | None] = PROMPTS,
    *,
    denoiser: str | None = None,
    parts: Sequence[str] | None = None,
    levels: int = LEVELS,
    call: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> LayerScores:
    """Score every layer and part of a pipeline's denoiser. Nothing is trained and nothing of the pipeline changed.

    The pipeline runs once per prompt, plainly; at a few of its steps every layer is left out in turn, from where it
    matters on only.

    Args:
        pipe: a stock diffusers pipeline that is described in `skipguide.pipelines.registry.described`.
        prompts: one run each; None leaves the prompt to `call`. A single text is one prompt.
        denoiser: which of the pipeline's; None is the first.
        parts: parts to leave out; None is every part that a layer has, but those that have options (`attn_blur`, …).
        levels: how many steps of a run are looked at, evenly spaced.
        call: more arguments of the pipeline's call (sizes, `guidance_scale`, `num_inference_steps`, 8 by default);
            before the pipeline's own defaults come those of the `generation.json` in the folder it was loaded from,
            such as the bundled model's sizes.
        seed: of the noise, one more per prompt.

    Raises:
        SkipError: for an unknown pipeline, a part that no layer has, guidance in force, or predictions that
            are no numbers.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts  # a single text is one prompt, not a list of letters
    parts = [parts] if isinstance(parts, str) else parts
    spec = pipeline_spec(pipe)
    if spec.inside:
        raise SkipError(
            f"{type(pipe).__name__} has a pipeline that goes through the steps: calibrate pipe.{spec.inside}"
        )
    name = denoiser or next((n for n in spec.denoisers if getattr(pipe, n, None) is not None), spec.denoisers[0])
    model: Any = getattr(pipe, name, None)
    if name not in spec.denoisers or model is None:
        raise SkipError(f"this {type(pipe).__name__} has no denoiser {name!r}: expected {' or '.join(spec.denoisers)}")
    if gate_of(model).everywhere:
        raise SkipError(f"guidance is applied to pipe.{name}: calibrate before, or call remove() on its handle first")
    refuse_caches(model, "a calibration", "it would answer for layers that are left out", pipe)
    blocks = find_blocks(model)
    keys = [(b.index, part) for b in blocks for part in b.parts if part in (RANKED if parts is None else parts)]
    if not keys:
        raise SkipError(f"no layer of {type(unwrap(model)).__name__} has any of the parts {list(parts or ())}")
    levels, seed = as_whole("levels", levels), as_whole("seed", seed, None)
    listener = _Listener(pipe, spec, model, keys, levels)
    arguments = own_call(pipe) | {"num_inference_steps": STEPS, "output_type": "latent"} | dict(call or {})
    listener.listen()
    try:
        for number, prompt in enumerate(prompts):
            own = {"generator": torch.Generator("cpu").manual_seed(seed + number)} | arguments
            pipe(**own if prompt is None else {"prompt": prompt, **own})
            listener.score_last_step(None)
    finally:
        listener.leave()
    total = len(blocks)
    rows = []
    for (layer, part), samples in listener.samples.items():
        if not samples:
            raise SkipError("the pipeline never called its denoiser at a step that was to be looked at")
        cost = (total - layer - (part == "block")) / total
        count = sum(len(sample["effect"]) for sample in samples)
        means: dict[str, Any] = average(samples)
        rows.append(LayerScore(layer, blocks[layer].name, blocks[layer].stack, part, **means, cost=cost, samples=count))
    steps = native(arguments["num_inference_steps"])
    scored = len(chosen_steps(steps, levels))
    about = {"prompts": len(prompts), "steps": steps, "levels": scored, "seed": seed}
    return LayerScores(tuple(rows), type(unwrap(model)).__name__, total, model_hash(model), about)


def own_call(pipe: Any) -> dict[str, Any]:
    """Arguments for the pipeline's call from the `generation.json` in its folder, without those it does not take."""
    folder = getattr(pipe, "name_or_path", None)
    if not isinstance(folder, (str, Path)) or not folder or not (file := Path(folder, "generation.json")).is_file():
        return {}
    takes = inspect.signature(type(pipe).__call__).parameters
    found = read_json(file)
    if not isinstance(found, Mapping):
        raise SkipError(f"expected arguments of the call as a mapping in {file}; got {type(found).__name__}")
    return {name: value for name, value in found.items() if name in takes}


def model_hash(model: nn.Module) -> str:
    """The hash by which scores are cached: of names, shapes and sampled values of the weights."""
    return fingerprint(list(unwrap(model).state_dict().items()))


def cache_file(model: nn.Module) -> Path:
    """Where the scores of a model are kept: under `$SKIPGUIDE_CACHE`, `$XDG_CACHE_HOME/skipguide` or `~/.cache`."""
    base = os.environ.get("SKIPGUIDE_CACHE")
    home = Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skipguide"
    return home / "scores" / f"{type(unwrap(model)).__name__}-{model_hash(model)}.json"


def cached_scores(model: nn.Module) -> LayerScores | None:
    """The scores that an earlier calibration of the same weights left."""
    path = cache_file(model)
    if not path.is_file():
        return None
    try:
        return LayerScores.load_json(path)
    except (SkipError, OSError) as error:
        logger.warning("the cached scores %s cannot be read (%s); they are made anew", path, error)
        return None


def keep_scores(model: nn.Module, scores: LayerScores) -> Path | None:
    """Cache scores beside those of other parts; a cache that cannot be written is only reported."""
    path = cache_file(model)
    if (old := cached_scores(model)) is not None:
        own = {(row.layer, row.part) for row in scores.rows}
        scores = replace(scores, rows=(*scores.rows, *(r for r in old.rows if (r.layer, r.part) not in own)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, scores.to_dict(), overwrite=True)
    except OSError as error:
        logger.warning("the scores could not be cached in %s: %s", path, error)
        return None
    return path


def auto_layers(
    pipe: Any, denoiser: str, part: str, stack: str | None = None, score: str = DEFAULT_SCORE
) -> tuple[int, ...]:
    """The layers of `layers="auto"`, counted within `stack` if there is one: from the cache, or from a calibration run.

    Raises:
        SkipError: if a calibration is needed and the pipeline cannot be run with a prompt alone.
    """
    model: nn.Module = getattr(pipe, denoiser)
    scores = cached_scores(model)
    if scores is None or not scores.select(part, stack):
        logger.info("layers='auto': calibrating %s once", type(unwrap(model)).__name__)
        try:
            scores = calibrate(pipe, denoiser=denoiser, parts=[part])
        except (TypeError, ValueError, AttributeError) as error:
            raise SkipError(
                f"layers='auto' has no cached scores for this model, and the calibration run failed: {error}. Run "
                f"scores = skipguide.pipelines.calibrate(pipe, call={{...}}) with the arguments that this pipeline "
                f"needs and keep_scores(pipe.{denoiser}, scores), or `skipguide rank MODEL`"
            ) from error
        keep_scores(model, scores)
    chosen = scores.choose(score, part, stack)
    if stack is None:
        return chosen
    own = [block.index for block in find_blocks(model) if block.stack == stack]
    return tuple(own.index(layer) for layer in chosen)
