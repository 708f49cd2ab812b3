"""The caches of the `caches` benchmark, each set so that it answers about half of the steps, or of the attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch

ATTENTION = r".*blocks\.\d+\.attn\d?"
HALVINGS = 7


def _clock(pipe: Any) -> Callable[[], float]:
    """Outside of every range at the first step, where nothing can be answered, and inside at the others."""
    return lambda: -1.0 if pipe.scheduler.step_index in (None, 0) else 500.0


def _mag(pipe: Any, steps: int) -> Any:
    return diffusers.MagCacheConfig(
        mag_ratios=[1.0] * steps, num_inference_steps=steps, threshold=0.01, retention_ratio=0.0, max_skip_steps=1
    )


def _sea(pipe: Any, steps: int) -> Any:
    if not isinstance(pipe, diffusers.WanPipeline):
        raise ValueError("this pipeline does not say at which noise level a pass is, so SeaCache never answers")
    return diffusers.SeaCacheConfig(threshold=1e6, cache_end_steps=0, max_consecutive_cached=1)


def _taylor_seer(pipe: Any, steps: int) -> Any:
    return diffusers.TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=1,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[ATTENTION],
    )


def _broadcast(pipe: Any, steps: int) -> Any:
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=_clock(pipe),
    )


def _faster(pipe: Any, steps: int) -> Any:
    return diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        attention_weight_callback=lambda _: 0.5,
        is_guidance_distilled=True,
        current_timestep_callback=_clock(pipe),
    )


_CONFIGS: dict[str, Callable[[Any, int], Any]] = {
    "FirstBlockCache": lambda pipe, steps: diffusers.FirstBlockCacheConfig(threshold=_threshold(pipe)),
    "MagCache": _mag,
    "SeaCache": _sea,
    "TaylorSeerCache": _taylor_seer,
    "PyramidAttentionBroadcast": _broadcast,
    "FasterCache": _faster,
}
CACHES = ("none", *_CONFIGS, "cache-dit")
_THRESHOLDS: dict[int, float] = {}


@contextmanager
def enabled(cache: str, pipe: Any, steps: int) -> Iterator[None]:
    """A cache on the pipeline's transformer inside the block.

    Raises:
        ValueError: if the cache cannot be put there.
        ImportError: without cache-dit, for that.
    """
    if cache == "none":
        yield
        return
    if cache == "cache-dit":
        with _cache_dit(pipe, steps):
            yield
        return
    pipe.transformer.enable_cache(_CONFIGS[cache](pipe, steps))
    try:
        yield
    finally:
        pipe.transformer.disable_cache()
        pipe.transformer._diffusers_hook.invalidate_child_registries_cache()


@contextmanager
def _cache_dit(pipe: Any, steps: int) -> Iterator[None]:
    """DBCache on the transformer alone, whose mask says which steps are computed."""
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=1,
        residual_diff_threshold=0.1,
        num_inference_steps=steps,
        steps_computation_mask=[1 - step % 2 for step in range(steps)],
        steps_computation_policy="static",
        enable_separate_cfg=isinstance(pipe, diffusers.WanPipeline),
    )
    cache_dit.enable_cache(pipe.transformer, cache_config=config)
    try:
        yield
    finally:
        cache_dit.disable_cache(pipe.transformer)


def calibrate(pipe: Any, run: Callable[[], object], count: Callable[[], Any], whole: int) -> float:
    """The threshold of FirstBlockCache at which about half of the steps are answered, found by halving.

    Args:
        pipe: the pipeline.
        run: one call of it.
        count: a context that counts the blocks that ran, as `.stats.rows`.
        whole: blocks of a call without a cache.
    """
    low, high, best = 0.0, 4.0, (1.0, 1.0)
    for _ in range(HALVINGS):
        middle = _THRESHOLDS[id(pipe)] = (low + high) / 2
        with enabled("FirstBlockCache", pipe, 0), count() as counter:
            run()
        share = sum(counter.stats.rows.values()) / whole
        best = min(best, (abs(share - 0.5), middle))
        low, high = (middle, high) if share > 0.5 else (low, middle)
    _THRESHOLDS[id(pipe)] = best[1]
    return best[1]


def _threshold(pipe: Any) -> float:
    return _THRESHOLDS.get(id(pipe), 0.1)
