"""Caches: diffusers' caches on a denoiser that gets skip guidance. Which go together, what changes, what is refused.

A cache answers in place of blocks from what it saw at earlier steps. The pipeline's passes keep theirs; a skipped pass
runs in a `cache_context` of its own ("skip", "skip_1", …), so that it is answered from skipped passes only. A cache
that decides for whole blocks leaves nothing to capture in a pass that it answers, so there the skipped pass runs whole,
as far as the cache lets it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from skipguide.errors import SkipError
from skipguide.hosts.wrappers import unwrap

if TYPE_CHECKING:
    from skipguide.pipelines.sampling.recipe import Recipe
    from skipguide.pipelines.stg import SpatiotemporalSkipGuidance


@dataclass(frozen=True)
class Cache:
    """One of diffusers' caches.

    Args:
        hooks: how the names of its hooks begin.
        refusal: why it cannot be used with skipped passes, if it cannot.
        counts: it takes the passes of a context for the steps of the run, so none may be left out.
        leads: it decides by what the first block adds, so that block may not be skipped.
    """

    hooks: tuple[str, ...]
    refusal: str = ""
    counts: bool = False
    leads: bool = False


CACHES: dict[str, Cache] = {
    "FirstBlockCache": Cache(("fbc_",), leads=True),
    "MagCache": Cache(("mag_cache_",), counts=True),
    "TaylorSeerCache": Cache(("taylorseer_cache",)),
    "PyramidAttentionBroadcast": Cache(
        ("pyramid_attention_broadcast",),
        "it keeps one state for all passes, so a skipped pass would be given the attention of the plain one",
    ),
    "FasterCache": Cache(
        ("faster_cache_",),
        "it makes up the unconditional rows of a batch, and would take the rows of a skipped pass for such a batch",
    ),
    "SeaCache": Cache(
        ("sea_cache_",),
        "it follows the noise level that the pipeline announces with its passes, and skipped passes have none",
    ),
    "TextKVCache": Cache(("text_kv_cache_",), "it was never tried with skipped passes"),
}


def hook_names(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every hook of diffusers in a model: the module that it is on, and its name."""
    for module in unwrap(model).modules():
        for name in getattr(module.__dict__.get("_diffusers_hook"), "_hook_order", ()):
            yield module, name


def cache_on(model: nn.Module) -> str | None:
    """The name of the cache on a model, however it was put there; None without one."""
    for _, hook in hook_names(model):
        for name, cache in CACHES.items():
            if hook.startswith(cache.hooks):
                return name
    return None


def admit_cache(
    pipe: Any, denoiser: str, model: nn.Module, settings: SpatiotemporalSkipGuidance, recipe: Recipe
) -> str | None:
    """The name of the cache on a denoiser, if there is one and it goes together with the guidance.

    Raises:
        SkipError: if it does not, with the reason.
    """
    if getattr(pipe, "_is_cached", False) or getattr(model, "_is_cached", False):
        raise SkipError(
            f"pipe.{denoiser} has cache-dit on it, which counts the denoiser's passes and would take a skipped one "
            f"for the pipeline's: call cache_dit.disable_cache(pipe) first"
        )
    name = cache_on(model)
    if name is None:
        return None
    cache = CACHES[name]
    words = cache.refusal
    if not words and (settings.formula == "segmented" or settings.cfg_interval is not None):
        words = "cfg_interval leaves passes of the pipeline out, which the cache takes for its steps"
    if not words and settings.formula == "uncond" and (settings.start, settings.stop) != (0.0, 1.0):
        words = "formula='uncond' skips in the pipeline's own pass, whose cache would mix skipped and plain steps"
    if not words and settings.tail == "batched":
        words = "tail='batched' changes the batch that the cache sees"
    if not words and cache.leads and recipe.removes(0):
        words = "it decides by what block 0 adds to its input, and block 0 is to be skipped"
    if not words and cache.counts and not recipe.constant:
        words = "it counts passes as steps, so the skipped pass has to run at every step: use every=1 and no window"
    if words:
        raise SkipError(
            f"pipe.{denoiser} has {name} enabled, and skip guidance cannot be exact with it: {words}. Call "
            f"pipe.{denoiser}.disable_cache() first, or change what is named"
        )
    return name


def answers_for_blocks(model: nn.Module, blocks: set[int]) -> bool:
    """Whether a cache answers in place of whole blocks, so that a pass may leave nothing to capture at them.

    Args:
        model: the denoiser.
        blocks: ids of its blocks.
    """
    hooks = tuple(hook for cache in CACHES.values() for hook in cache.hooks)
    return any(name.startswith(hooks) and id(module) in blocks for module, name in hook_names(model))
