"""Scales: what a guider does beside skip guidance, by the step and the modality: CFG, modality isolation, rescale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers.guiders.guider_utils import BaseGuidance
from torch import nn

from skipguide.config import JsonConfig
from skipguide.errors import SkipError
from skipguide.pipelines.groups import Scale, check_scale, value_at, values_of
from skipguide.pipelines.sampling.caches import refuse_caches
from skipguide.pipelines.sampling.modalities import check_names
from skipguide.pipelines.settings import GuidanceSettings
from skipguide.schedule import Timetable

NAMES = ("guidance_scale", "guidance_rescale", "modality_scale")


class ScaledGuider(BaseGuidance):
    """The scales of a guider of diffusers: each a number, a `Timetable` over the steps, or one for video and sound.

    Attributes:
        guidance_scale: of CFG.
        guidance_rescale: 0 to 1, on every step, after everything else.
        modality_scale: of the pass with video and sound apart; 1 is no such pass.
        use_original_formulation: whether CFG is c + w (c - u).
    """

    guidance_scale: Scale
    guidance_rescale: Scale
    modality_scale: Scale
    use_original_formulation: bool
    _count_prepared: int
    _modality = ""  # whose predictions are combined

    def _set_scales(self, **given: Any) -> None:
        """Check and keep the scales, by name.

        Raises:
            SkipError: for something that is none.
        """
        for name, value in given.items():
            setattr(self, name, check_scale(value, name))
        if not all(0 <= value <= 1 for value in amounts(self.guidance_rescale, None)):
            raise SkipError(f"guidance_rescale must lie in 0 to 1; got {given['guidance_rescale']!r}")
        every = [own for name in NAMES for own in each_of(getattr(self, name))]
        if any(isinstance(own, Timetable) and own.over == "sigma" for own in every):
            raise SkipError("a guider is not told the noise level: use Timetable(..., over='step')")

    def _check_names(self, modalities: Sequence[str], who: str) -> None:
        """Refuse scales of modalities that a pipeline does not have.

        Raises:
            SkipError: saying what it has.
        """
        for name in NAMES:
            if isinstance(value := getattr(self, name), Mapping):
                check_names(name, value, modalities, who)
        if not modalities and self._isolates(None):
            raise SkipError(f"modality_scale is about video and sound, and {who} predicts one thing: leave it at 1")

    def _check_cfg(self, settings: GuidanceSettings) -> None:
        """Refuse settings about the unconditional pass where there never is one.

        Raises:
            SkipError: saying which.
        """
        about_cfg = settings.rule.needs_cfg or settings.cfg_steps is not None or settings.zero_star
        about_cfg = about_cfg or (settings.schedule is not None and settings.schedule.has_cfg)
        if about_cfg and not any(w + self._offset != 1 for w in amounts(self.guidance_scale, None)):
            raise SkipError(
                f"formula={settings.formula!r}, cfg_interval={settings.cfg_interval}, cfg_every={settings.cfg_every} "
                f"or zero_star={settings.zero_star} is about the unconditional pass, and there is none: "
                f"guidance_scale={self.guidance_scale} is no CFG"
            )

    @property
    def w(self) -> float:
        """The CFG scale in the form u + w (c - u), at this step."""
        return self._amount(self.guidance_scale) + self._offset

    @property
    def _offset(self) -> float:
        return 1.0 if self.use_original_formulation else 0.0

    @property
    def _fraction(self) -> float | None:
        """The share of the steps that is done; None before the first run."""
        if self._step is None or not self._num_inference_steps:
            return None
        return float(self._step / self._num_inference_steps)

    def _amount(self, scale: Scale) -> float:
        """A scale at this step, of the modality that is combined."""
        own = scale.get(self._modality, next(iter(scale.values()))) if isinstance(scale, Mapping) else scale
        return float(value_at(own, self._fraction or 0.0))

    def _has_cfg(self, fraction: float | None) -> bool:
        return bool(self._enabled) and any(w + self._offset != 1 for w in amounts(self.guidance_scale, fraction))

    def _refuse_cache(self, model: nn.Module) -> None:
        """Refuse a cache where some steps have no unconditional pass.

        Raises:
            SkipError: if there is one.
        """
        tables = [own for own in each_of(self.guidance_scale) if isinstance(own, Timetable)]
        if any(value + self._offset == 1 for own in tables for value in own.values):
            refuse_caches(model, "guidance", "guidance_scale is no CFG at some steps, which leaves passes out")

    def _isolates(self, fraction: float | None) -> bool:
        return bool(self._enabled) and any(scale != 1 for scale in amounts(self.modality_scale, fraction))

    @property
    def _most_conditions(self) -> int:
        return 2 if self._has_cfg(self._fraction) else 1

    def active_predictions(self) -> list[str]:
        """The passes of the step that is running, by name; LTX-2's loop asks for them."""
        raise NotImplementedError

    @property
    def spatio_temporal_guidance_blocks(self) -> None:
        """None: LTX-2's own way of perturbing blocks is not used; its loop asks for it."""
        return None


def each_of(scale: Scale) -> list[float | Timetable]:
    """The scale of every modality; of a model with one, that one."""
    return list(scale.values()) if isinstance(scale, Mapping) else [scale]


def amounts(scale: Scale, fraction: float | None) -> list[float]:
    """A scale of all modalities when this fraction of the steps is done; None: at any step."""
    if fraction is None:
        return [float(value) for own in each_of(scale) for value in values_of(own)]
    return [float(value_at(own, fraction)) for own in each_of(scale)]


def plain(scale: Scale) -> Any:
    """A scale as plain data, for the config."""
    if isinstance(scale, Mapping):
        return {name: plain(own) for name, own in scale.items()}
    return scale.to_dict() if isinstance(scale, JsonConfig) else scale
