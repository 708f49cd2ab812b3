"""The caches of diffusers and of cache-dit: a record each, what their hooks are called, and which is on a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from skipguide.hosts import cache_dit
from skipguide.hosts.wrappers import unwrap


@dataclass(frozen=True)
class Cache:
    """One cache.

    Args:
        hooks: how the names of its hooks begin, if it has hooks of diffusers.
        refusal: why it cannot be used with skipped passes, if it cannot.
        counts: it takes the passes of a context for the steps of the run, so none may be left out.
        leads: it decides by what the first block adds, so that block may not be skipped.
        ending: the call that takes it off, with the model as `{model}`.
    """

    hooks: tuple[str, ...]
    refusal: str = ""
    counts: bool = False
    leads: bool = False
    ending: str = "{model}.disable_cache()"


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
# every cache that anybody can find on a model: entry points ask `cache_on`, and nothing else
KNOWN: dict[str, Cache] = CACHES | {
    cache_dit.NAME: Cache(
        (),
        "it counts the denoiser's passes and would take a skipped one for the pipeline's",
        ending="cache_dit.disable_cache(pipe)",
    )
}


def hook_names(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every hook of diffusers in a model: the module that it is on, and its name."""
    for module in unwrap(model).modules():
        for name in getattr(module.__dict__.get("_diffusers_hook"), "_hook_order", ()):
            yield module, name


def cache_on(model: nn.Module, pipe: object = None) -> str | None:
    """The name of the cache on a model, however it was put there; None without one.

    Args:
        model: the denoiser.
        pipe: its pipeline, where it is known: some caches are put on that.
    """
    if cache_dit.is_cached(model) or cache_dit.is_cached(pipe):
        return cache_dit.NAME
    for _, hook in hook_names(model):
        for name, cache in CACHES.items():
            if hook.startswith(cache.hooks):
                return name
    return None


def answers_for_blocks(model: nn.Module, blocks: set[int]) -> bool:
    """Whether a cache answers in place of whole blocks, so that a pass may leave nothing to capture at them.

    Args:
        model: the denoiser.
        blocks: ids of its blocks.
    """
    hooks = tuple(hook for cache in CACHES.values() for hook in cache.hooks)
    return any(name.startswith(hooks) and id(module) in blocks for module, name in hook_names(model))
