"""Caches on a denoiser that gets skip guidance, for every way to apply it. Which go together, and which are refused.

A cache answers in place of blocks from what it saw at earlier steps. Each branch has a state of its own: the pipeline's
passes theirs, each skipped pass one more (`hosts.branch_states`), so that the cache decides for each branch by itself
and answers it from its own past only. What is known of each cache is its record in `hosts.diffusers_caches`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from skipguide.errors import SkipError
from skipguide.gate import gate_of
from skipguide.hosts import cache_dit, teacache
from skipguide.hosts.diffusers_caches import KNOWN, cache_on, hooked_nothing, makes_uncond
from skipguide.hosts.diffusers_hooks import is_behind_cache
from skipguide.hosts.wrappers import unwrap
from skipguide.pipelines.sampling.schedule import GuidanceSchedule
from skipguide.pipelines.settings import GuidanceSettings


def admit_cache(
    pipe: Any, denoiser: str, model: nn.Module, settings: GuidanceSettings, schedule: GuidanceSchedule
) -> str | None:
    """The name of the cache on a denoiser, if there is one and it goes together with the guidance.

    Args:
        pipe: the pipeline; None under a guider, which is not given it.
        denoiser: its name there.
        model: itself.
        settings: the guidance.
        schedule: the same on this denoiser.

    Raises:
        SkipError: if it does not, with the reason.
    """
    name = cache_on(model, pipe)
    if name is None:
        return None
    words = _of_the_cache(name, model, schedule) or _of_the_settings(name, model, settings, schedule)
    if pipe is None and not words and makes_uncond(model, name):
        words = (
            "it makes up half of a batch of both branches, and a guider has a pass for each: set is_guidance_distilled"
        )
    if words:
        place = f"pipe.{denoiser}" if pipe is not None else "the denoiser"
        raise SkipError(
            f"{place} has {name} enabled, and skip guidance cannot be exact with it: {words}. Call "
            f"{KNOWN[name].ending.format(model=place)} first, or change what is named"
        )
    return name


def _of_the_cache(name: str, model: nn.Module, schedule: GuidanceSchedule) -> str:
    """Why the cache, as it is on this model, goes together with no guidance; empty if it does."""
    gate = gate_of(unwrap(model))
    if KNOWN[name].refusal:
        return KNOWN[name].refusal
    if hooked_nothing(model, name) and not makes_uncond(model, name):
        return (
            f"none of its hooks is on a block or an attention layer of this {type(unwrap(model)).__name__}, so it "
            f"would never answer: give it identifiers that match the model's modules"
        )
    if is_behind_cache(gate, unwrap(model)):
        return "it was enabled behind the guidance, which it would call from inside: enable it first, then apply"
    if name == cache_dit.NAME:
        return cache_dit.refusal(model, schedule.constant, gate)
    return teacache.refusal(model, gate.inner) if name == teacache.NAME else ""


def _of_the_settings(name: str, model: nn.Module, settings: GuidanceSettings, schedule: GuidanceSchedule) -> str:
    """Why the cache does not go together with these settings; empty if it does."""
    cache = KNOWN[name]
    if left_out := schedule.times.leaves_uncond_out:
        return f"{left_out} leaves passes of the pipeline out, which the cache takes for its steps"
    inside = settings.rule.in_place_of_uncond
    if inside and (settings.window.start, settings.window.stop) != (0.0, 1.0):
        return (
            f"formula={settings.formula!r} skips in the pipeline's own pass, whose cache would mix skipped and plain "
            f"steps"
        )
    if inside and makes_uncond(model, name):
        return (
            f"it makes up the unconditional rows at most steps, and formula={settings.formula!r} leaves blocks out in "
            f"these very rows"
        )
    if settings.tail == "batched":
        return "tail='batched' changes the batch that the cache sees"
    if cache.leads and schedule.removes(0):
        return "it decides by what block 0 adds to its input, and block 0 is to be skipped"
    if cache.counts and not schedule.constant:
        return "it counts passes as steps, so the skipped pass has to run at every step: use every=1 and no window"
    return ""


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
