"""Caches: diffusers' caches on a denoiser that gets skip guidance. Which go together, what changes, what is refused.

A cache answers in place of blocks from what it saw at earlier steps. The pipeline's passes keep theirs; a skipped pass
runs in a `cache_context` of its own ("skip", "skip_1", …), so that it is answered from skipped passes only. A cache
that decides for whole blocks leaves nothing to capture in a pass that it answers, so there the skipped pass runs whole,
as far as the cache lets it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from skipguide.errors import SkipError
from skipguide.hosts.cache_dit import is_cached
from skipguide.hosts.diffusers_caches import CACHES, cache_on
from skipguide.pipelines.sampling.schedule import GuidanceSchedule
from skipguide.pipelines.settings import GuidanceSettings


def admit_cache(
    pipe: Any, denoiser: str, model: nn.Module, settings: GuidanceSettings, schedule: GuidanceSchedule
) -> str | None:
    """The name of the cache on a denoiser, if there is one and it goes together with the guidance.

    Raises:
        SkipError: if it does not, with the reason.
    """
    if is_cached(pipe) or is_cached(model):
        raise SkipError(
            f"pipe.{denoiser} has cache-dit on it, which counts the denoiser's passes and would take a skipped one "
            f"for the pipeline's: call cache_dit.disable_cache(pipe) first"
        )
    name = cache_on(model)
    if name is None:
        return None
    cache = CACHES[name]
    words = cache.refusal
    if not words and settings.cfg_interval is not None:
        words = "cfg_interval leaves passes of the pipeline out, which the cache takes for its steps"
    if not words and settings.rule.in_place_of_uncond and (settings.start, settings.stop) != (0.0, 1.0):
        words = (
            f"formula={settings.formula!r} skips in the pipeline's own pass, whose cache would mix skipped and plain "
            f"steps"
        )
    if not words and settings.tail == "batched":
        words = "tail='batched' changes the batch that the cache sees"
    if not words and cache.leads and schedule.removes(0):
        words = "it decides by what block 0 adds to its input, and block 0 is to be skipped"
    if not words and cache.counts and not schedule.constant:
        words = "it counts passes as steps, so the skipped pass has to run at every step: use every=1 and no window"
    if words:
        raise SkipError(
            f"pipe.{denoiser} has {name} enabled, and skip guidance cannot be exact with it: {words}. Call "
            f"pipe.{denoiser}.disable_cache() first, or change what is named"
        )
    return name
