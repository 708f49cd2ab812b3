"""Caches on a denoiser that gets skip guidance, for every way to apply it. Which go together, and which are refused.

A cache answers in place of blocks from what it saw at earlier steps. The pipeline's passes keep theirs; a skipped pass
runs in a `cache_context` of its own ("skip", "skip_1", …), so that it is answered from skipped passes only. A cache
that decides for whole blocks leaves nothing to capture in a pass that it answers, so there the skipped pass runs whole,
as far as the cache lets it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from skipguide.errors import SkipError
from skipguide.hosts.diffusers_caches import KNOWN, cache_on
from skipguide.pipelines.sampling.schedule import GuidanceSchedule
from skipguide.pipelines.settings import GuidanceSettings


def admit_cache(
    pipe: Any, denoiser: str, model: nn.Module, settings: GuidanceSettings, schedule: GuidanceSchedule
) -> str | None:
    """The name of the cache on a denoiser, if there is one and it goes together with the guidance.

    Raises:
        SkipError: if it does not, with the reason.
    """
    name = cache_on(model, pipe)
    if name is None:
        return None
    cache = KNOWN[name]
    words = cache.refusal
    if not words and settings.cfg_interval is not None:
        words = "cfg_interval leaves passes of the pipeline out, which the cache takes for its steps"
    if not words and settings.rule.in_place_of_uncond and (settings.window.start, settings.window.stop) != (0.0, 1.0):
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
        place = f"pipe.{denoiser}"
        raise SkipError(
            f"{place} has {name} enabled, and skip guidance cannot be exact with it: {words}. Call "
            f"{cache.ending.format(model=place)} first, or change what is named"
        )
    return name


def refuse_caches(model: nn.Module, what: str, why: str, pipe: object = None) -> None:
    """Refuse every cache on a denoiser, where no skipped pass can have a state of its own.

    Args:
        model: the denoiser.
        what: what cannot be done with a cache.
        why: why not.
        pipe: its pipeline, where it is known.

    Raises:
        SkipError: if there is one.
    """
    if (name := cache_on(model, pipe)) is not None:
        raise SkipError(
            f"this denoiser has {name} enabled, and {what} cannot be exact with it: {why}. Call "
            f"{KNOWN[name].ending.format(model='the denoiser')} first"
        )
