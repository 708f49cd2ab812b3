"""Caches of diffusers, cache-dit and TeaCache: one record each, which is on a model, and how far it answers.

What is known of a cache stands in its record and nowhere else: the gate asks which hooks stay in front of it
(`IN_FRONT`, `AT_THE_MODEL`), guidance asks what goes together (`refusal` and the flags), the passes ask how much of
the model it answers for (`reach_of`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from skipguide.hosts import cache_dit, teacache
from skipguide.hosts.wrappers import unwrap


@dataclass(frozen=True)
class Cache:
    """One cache.

    Args:
        hooks: how the names of its hooks on blocks and sublayers begin, if it has hooks of diffusers.
        root: how those begin that it has on the model itself; a pass that does not go through them is none of its own.
        apart: where it keeps a state per branch: `"contexts"` of diffusers by name; `"hooks"`, one in each of them,
            and `"manager"` and `"attributes"`, which are exchanged around each pass.
        refusal: why it cannot be used with skipped passes, if it cannot.
        counts: it takes the passes of a branch for the steps of the run, so none may be left out.
        leads: it decides by what the first block adds, so that block may not be skipped.
        makes_uncond: it makes up the unconditional rows, in which nothing can be left out then.
        fast: how many of the first blocks it always runs to decide; None: where it answers for blocks it does so one
            by one, and no pass can start in the middle.
        ending: the call that takes it off, with the model as `{model}`.
    """

    hooks: tuple[str, ...] = ()
    root: tuple[str, ...] = ()
    apart: str = "contexts"
    refusal: str = ""
    counts: bool = False
    leads: bool = False
    makes_uncond: bool = False
    fast: int | None = 0
    ending: str = "{model}.disable_cache()"


CACHES: dict[str, Cache] = {
    "FirstBlockCache": Cache(("fbc_",), leads=True, fast=1),
    "MagCache": Cache(("mag_cache_",), counts=True),
    "TaylorSeerCache": Cache(("taylorseer_cache",), fast=None),
    "PyramidAttentionBroadcast": Cache(("pyramid_attention_broadcast",), apart="hooks"),
    "FasterCache": Cache(("faster_cache_block",), ("faster_cache_denoiser",), apart="hooks", makes_uncond=True),
    "SeaCache": Cache(("sea_cache_leader", "sea_cache_block", "sea_cache_post_norm"), ("sea_cache_root",)),
    "TextKVCache": Cache(("text_kv_cache_block",), ("text_kv_cache_transformer",)),
}
# every cache that anybody can find on a model: entry points ask `cache_on`, and nothing else
KNOWN: dict[str, Cache] = CACHES | {
    cache_dit.NAME: Cache(apart="manager", ending="cache_dit.disable_cache(pipe)"),
    teacache.NAME: Cache(apart="attributes", counts=True, ending=teacache.ENDING),
}
# hooks that answer in place of a block or a sublayer stay in front of its gate; those of the model stay behind its own
IN_FRONT: tuple[str, ...] = tuple(name for cache in CACHES.values() for name in cache.hooks)
FOR_ALL_BLOCKS: tuple[str, ...] = tuple(
    name for cache in CACHES.values() if cache.apart == "contexts" and cache.fast is not None for name in cache.hooks
)
AT_THE_MODEL: tuple[str, ...] = tuple(name for cache in CACHES.values() for name in cache.root)


@dataclass(frozen=True)
class Reach:
    """How much of a model a cache answers for.

    Attributes:
        blocks: whether it answers in place of whole blocks, so that a pass may leave nothing to capture at them.
        first: how many of the first blocks run in every pass; it decides by what the last of them returns.
        last: how many of the last blocks run in every pass.
        whole: no pass can start in the middle.
    """

    blocks: bool = False
    first: int = 0
    last: int = 0
    whole: bool = False


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
    if (name := marked(model, pipe)) is not None:
        return name
    for _, hook in hook_names(model):
        for name, cache in CACHES.items():
            if hook.startswith((*cache.hooks, *cache.root)):
                return name
    # `enable_cache` of diffusers says nothing where no module has a name that the cache looks for
    enabled = type(getattr(unwrap(model), "_cache_config", None)).__name__.removesuffix("Config")
    return enabled if enabled in CACHES else None


def marked(model: nn.Module, pipe: object = None) -> str | None:
    """The name of a cache that is told by marks on the model or its pipeline, without a walk through the model."""
    if cache_dit.is_cached(model) or cache_dit.is_cached(pipe):
        return cache_dit.NAME
    return teacache.NAME if teacache.is_on(model) else None


def hooked_nothing(model: nn.Module, name: str) -> bool:
    """Whether a cache of diffusers is enabled and none of its hooks is on a block or a sublayer: it never answers."""
    hooks = CACHES[name].hooks if name in CACHES else ()
    return bool(hooks) and not any(hook.startswith(hooks) for _, hook in hook_names(model))


def is_cached_inside(block: nn.Module) -> bool:
    """Whether a cache may answer for sublayers of a block, which then do not run."""
    return any(name.startswith(IN_FRONT) for _, name in hook_names(block))


def makes_uncond(model: nn.Module, name: str) -> bool:
    """Whether the cache on a model makes up unconditional rows of a batch, as it is set now."""
    if not KNOWN[name].makes_uncond:
        return False
    return not all(getattr(hook, "is_guidance_distilled", True) for hook in hooks_of(model, name))


def hooks_of(model: nn.Module, name: str) -> list[Any]:
    """The hooks of a cache of diffusers, those of the model first."""
    cache, found = KNOWN[name], []
    for module, hook in hook_names(model):
        if hook.startswith((*cache.root, *cache.hooks)):
            found.append(module.__dict__["_diffusers_hook"].hooks[hook])
    return found


def reach_of(model: nn.Module, name: str, blocks: Mapping[int, str]) -> Reach:
    """How much of a model the cache on it answers for, as it is set now.

    Args:
        model: the denoiser.
        name: the cache.
        blocks: id of each of its blocks -> the block's name, in execution order.
    """
    if name == cache_dit.NAME:
        first, last, whole = cache_dit.zones(model, tuple(blocks.values()))
        return Reach(True, first, last, whole)
    if name == teacache.NAME:
        return Reach(True)
    cache = CACHES[name]
    at_blocks = any(hook.startswith(cache.hooks) and id(module) in blocks for module, hook in hook_names(model))
    if makes_uncond(model, name):  # it answers a pass of one branch otherwise than a pass of both
        return Reach(at_blocks, whole=True)
    return Reach(at_blocks, cache.fast or 0, whole=at_blocks and cache.fast is None)
