"""Attachment: a guider takes the place of the one that a pipeline has; a pipeline without one is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from skipguide.errors import SkipError
from skipguide.pipelines.guider.combination import MODALITIES
from skipguide.pipelines.presets import find_preset
from skipguide.pipelines.registry.described import refuse_no_pipeline
from skipguide.pipelines.settings import GuidanceSettings

S = TypeVar("S", bound=GuidanceSettings)
SOUND = "audio_guider"  # what a pipeline calls the guider of the sound


def attach_guider(guider: Any, pipe: Any, component: str = "guider") -> None:
    """Make a guider the pipeline's.

    Args:
        guider: the guider.
        pipe: a modular pipeline, or a classic one with a guider among its components.
        component: which of the pipeline's guiders.

    Raises:
        SkipError: if the pipeline has no such guider: as a mere attribute it would never be called.
    """
    refuse_no_pipeline(pipe)
    name = type(pipe).__name__
    if callable(update := getattr(pipe, "update_components", None)):
        if component in getattr(pipe, "component_names", ()):
            places = ("guider", SOUND) if modalities_of(pipe) else (component,)
            update(**dict.fromkeys(places, guider))
            return
        raise SkipError(
            f"expected a pipeline with a component {component!r}; the blocks of this {name} have "
            f"{', '.join(getattr(pipe, 'component_names', ())) or 'none'}: no guider would ever be called. The classic "
            f"pipeline of this model may be guided by SpatiotemporalSkipGuidance(...).apply(pipe)"
        )
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise SkipError(f"expected a pipeline of diffusers; got a {name}: pass the pipeline, not a part of it")
    if component not in components:
        raise SkipError(
            f"{name} has no {component}, so a SkipGuider would never be called: guide it with "
            f"SpatiotemporalSkipGuidance(...).apply(pipe), which takes the same settings"
        )
    setattr(pipe, component, guider)


def modalities_of(pipe: Any) -> tuple[str, ...]:
    """What a pipeline's guiders are for, where it has one for the video and one for the sound; else nothing.

    Raises:
        SkipError: for something that is no pipeline.
    """
    refuse_no_pipeline(pipe)
    return tuple(MODALITIES) if SOUND in (getattr(pipe, "component_names", None) or ()) else ()


def with_preset(settings: S, pipe: Any) -> S:
    """The settings with the preset of the pipeline's denoiser, where that is all that they ask for.

    A guider has a CFG scale of its own, so that of the preset is left out.
    """
    model = getattr(pipe, "transformer", None)
    if not settings.whole_preset or settings.idle or not isinstance(model, nn.Module):
        return settings
    return replace(settings.filled(find_preset(model, pipe)), guidance_scale=None)
