"""SkipGuider: skip guidance as a guider of diffusers, for pipelines that have a `guider` component."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from torch import Tensor, nn

from skipguide.config import as_flag
from skipguide.errors import SkipError
from skipguide.guidance import rescale, skip_direction
from skipguide.pipelines.groups import Scale, SkipGroup
from skipguide.pipelines.guider.attachment import attach_guider, modalities_of, with_preset
from skipguide.pipelines.guider.combination import Combination, modality_of
from skipguide.pipelines.guider.driver import Driver
from skipguide.pipelines.guider.one_thread import this_thread
from skipguide.pipelines.guider.scales import ScaledGuider, plain
from skipguide.pipelines.guider.step_batches import StepBatch, abandon, live_groups, step_batches
from skipguide.pipelines.pass_schedule import PassSchedule
from skipguide.pipelines.sampling.finite_watch import FiniteWatch
from skipguide.pipelines.sampling.ledger import GuidanceStats
from skipguide.pipelines.sampling.modalities import check_modalities
from skipguide.pipelines.sampling.predictions import widened
from skipguide.pipelines.sampling.schedule import StepOutline, StepPlan, StepTimes
from skipguide.pipelines.stg import SpatiotemporalSkipGuidance
from skipguide.schedule import Timetable

_OWN = ("guidance_scale", "guidance_rescale", "use_original_formulation", "enabled", "modality_scale")
_BOTH_PLACES = "where the sound has a guider too (LTX-2), one SkipGuider takes both places, by attach(pipe)"


class SkipGuider(ScaledGuider, BaseGuidance):  # a saved pipeline is loaded by this name in this module
    """Spatiotemporal skip guidance as a diffusers guider: `SkipGuider([8]).attach(pipe)`.

    `SpatiotemporalSkipGuidance` for modular pipelines and for the classic ones that have a `guider` component
    (HunyuanVideo 1.5, HunyuanImage, Motif). It takes the place of the pipeline's own guider, so it does CFG too. The
    skipped pass starts at the first skipped layer, from the activations of the conditional pass; `guidance_scale=1.0`
    is no CFG: c + s (c - k). The settings are the guider's config, saved and loaded with the pipeline.

    Args:
        layers: as there, but no mapping and no `"auto"`. A preset (None) with a window or a formula of its own needs
            `attach(pipe)`, which knows the model before the first step.
        scale: s, a number or a `Timetable` over the steps; 0 is CFG alone; None as there.
        guidance_scale: w of CFG; 1 is no CFG. A number, a `Timetable` over the steps, or, like `scale`, one for each
            of video and audio.
        part: as there.
        formula: likewise.
        rescale: likewise; acts on the steps with skip guidance.
        rescale_over: likewise.
        start: as there.
        stop: as there.
        every: compute the skipped pass on every k-th step only, reuse the last difference in between.
        prefix_reuse: as there.
        stack: count `layers` within this stack.
        groups: several `SkipGroup`s (or their `to_dict()`), in place of `layers`.
        cfg_interval: steps with CFG, as fractions; outside it there is no unconditional pass.
        apg: weight of the skip direction's part along c; None leaves the direction as it is.
        apg_norm: largest norm of the direction per clip.
        zero_star: scale the unconditional prediction as CFG-Zero* does (without its zero-init).
        drop: share of the blocks that `"stochastic"` leaves out.
        prefer_cheap: `"stochastic"` draws from the deeper half of the blocks only.
        seed: as in `SpatiotemporalSkipGuidance`.
        guidance_rescale: as in diffusers' guiders: on every step, after everything else.
        modality_scale: of LTX-2's pass with video and sound apart, as in diffusers' `LTX2Guidance`; 1 is no such pass.
        use_original_formulation: as in diffusers' guiders: c + w (c - u), and w = 0 is no CFG.
        enabled: False is the conditional prediction alone, and leaves every block alone.
        strength: as in `SpatiotemporalSkipGuidance`.
        heads: likewise.
        part_options: likewise.
        cfg_every: likewise.
        schedule: likewise.

    Attributes:
        stats: passes and blocks of all runs so far, as of `SpatiotemporalSkipGuidance`.

    Raises:
        SkipError: on settings that cannot mean anything; at the first step for what the model cannot do.

    Example:
        >>> guider = SkipGuider(layers=[8], scale=1.0, guidance_scale=5.0, start=0.1)
        >>> guider.config.layers, SkipGuider.from_config(guider.config).settings == guider.settings
        ([8], True)
    """

    _input_predictions = ["pred_cond", "pred_uncond", "pred_cond_skip", "pred_cond_modality"]  # noqa: RUF012 (of the base class)

    @register_to_config  # type: ignore[untyped-decorator, unused-ignore]
    def __init__(
        self,
        layers: Sequence[int] | int | Timetable | str | None = None,
        scale: Scale | None = None,
        guidance_scale: Scale = 5.0,
        part: str | None = None,
        formula: str | None = None,
        rescale: float | Timetable | None = None,
        rescale_over: str = "sample",
        start: float | None = None,
        stop: float | None = None,
        every: int = 1,
        prefix_reuse: bool = True,
        stack: str | None = None,
        groups: Sequence[SkipGroup | Mapping[str, Any]] | None = None,
        cfg_interval: tuple[float, float] | None = None,
        apg: float | None = None,
        apg_norm: float | None = None,
        zero_star: bool = False,
        drop: float = 0.1,
        prefer_cheap: bool = False,
        seed: int = 0,
        guidance_rescale: float | Mapping[str, float] = 0.0,
        use_original_formulation: bool = False,
        enabled: bool = True,
        modality_scale: float | Mapping[str, float] = 1.0,
        strength: float = 1.0,
        heads: Sequence[int] | Mapping[Any, Sequence[int]] | None = None,
        part_options: Mapping[str, Any] | None = None,
        cfg_every: int = 1,
        schedule: PassSchedule | Mapping[str, Any] | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__", *_OWN)}
        self.settings = SpatiotemporalSkipGuidance(**given)
        self._live = live_groups(self.settings)
        own = {"guidance_scale": guidance_scale, "guidance_rescale": guidance_rescale, "modality_scale": modality_scale}
        self._set_scales(**own)
        self.use_original_formulation = as_flag("use_original_formulation", use_original_formulation)
        super().__init__(self.settings.window.start, self.settings.window.stop, as_flag("enabled", enabled))
        kept = {name: value for name, value in self.settings.to_dict().items() if name in given}
        kept |= {name: plain(getattr(self, name)) for name in _OWN if name != "enabled"} | {"enabled": self._enabled}
        # diffusers counts positional arguments as defaults and drops defaults in from_config: so none is marked as one
        self.register_to_config(**json.loads(json.dumps(kept)), _use_default_values=[])
        self._check_cfg(self.settings)
        self.stats = GuidanceStats(delivery="guider")
        self._forget()

    def _forget(self) -> None:
        self._times = StepTimes(self.settings, self._live)
        self._drivers: list[Driver] = []
        self._passes: tuple[StepBatch, ...] = ()  # of the step that is running; empty between steps
        self._driver: Driver | None = None
        self._combinations: dict[str, Combination] = {}  # by modality
        self._told: Any = None  # the timestep of a step that was announced, and has no inputs yet
        self._places = self._left = 1  # in how many guiders' places this one stands, and how many are not combined yet
        self._watch = FiniteWatch()
        self._thread = 0

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the settings, and starts anew."""
        state = dict(self.__dict__)
        for name in ("_times", "_drivers", "_passes", "_driver", "_combinations", "_told", "_watch"):
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the settings."""
        self.__dict__.update(state)
        self._forget()

    def attach(self, pipe: Any, component: str = "guider") -> Self:
        """Take the place of a pipeline's own guider, modular or classic; returns the guider.

        In a pipeline with a guider for the sound too (LTX-2) it takes both places: its passes are for both predictions.

        Raises:
            SkipError: if the pipeline has none, and would never call this one; for scales of modalities that it does
                not have.
        """
        self._check_modalities(modalities_of(pipe), type(pipe).__name__)
        attach_guider(self, pipe, component)
        self.settings = with_preset(self.settings, pipe)
        self._live = live_groups(self.settings)
        self._check_cfg(self.settings)
        self._forget()
        return self

    def _check_modalities(self, modalities: Sequence[str], who: str) -> None:
        check_modalities(self.settings.scaled_groups, modalities, who)
        self._check_names(modalities, who)

    # -- what guidance there is ---------------------------------------------------------------------------------

    @property
    def num_conditions(self) -> int:
        """2 where the unconditional prediction is needed, else 1: of the running step, or of any step between steps."""
        if self._passes:
            return 1 + any(each.name == "pred_uncond" for each in self._passes)
        return self._most_conditions

    @property
    def is_conditional(self) -> bool:
        """Whether the pass that is running has the conditional inputs."""
        return not self._passes or self._passes[max(self._count_prepared, 1) - 1].inputs == 0

    def active_predictions(self) -> list[str]:
        """The passes of the step that is running, by name; LTX-2's loop asks for them."""
        return [each.name for each in self._passes]

    def _plan(self) -> tuple[StepBatch, ...]:
        """The passes of the step that begins."""
        step, steps = self._step, self._num_inference_steps
        if step is None or not steps:
            raise SkipError("set_state(step, num_inference_steps, timestep) comes before a step's inputs")
        self._check_cfg(self.settings)
        keys, combinations = tuple(each.key for each in self._step_plan().skipped), self._combinations.values()
        held = [each.holds(keys) for each in combinations]
        outline = self._outline() if self._enabled else replace(self._outline(), groups=())
        apart = (StepBatch("pred_cond_modality"),) if self._isolates(self._fraction) else ()
        again = [each.difference is not None for each in combinations]
        batches = step_batches(outline, held=bool(held) and all(held), difference=bool(again) and all(again))
        return (*batches, *apart)

    def _outline(self) -> StepOutline:
        return self._times.at(self._step, self._num_inference_steps, cfg=self._most_conditions == 2)

    def _step_plan(self, driver: Driver | None = None) -> StepPlan:
        """What holds at this step on a model (the last one that was called); nothing where guidance is switched off."""
        driver = driver or next(reversed(self._drivers), None)
        if driver is None or not self._enabled:
            return StepPlan(cfg=self._enabled and self._outline().cfg)
        return driver.schedule.at(self._step, self._num_inference_steps, cfg=self._most_conditions == 2)

    # -- the protocol of diffusers ------------------------------------------------------------------------------

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        """A step begins; one that is not later than the last begins a new run."""
        if self._told is not None and timestep is self._told and step == self._step:  # in the sound's place too
            self._places = 2
            return
        self._thread = this_thread(self._thread if self._drivers or self._passes else 0)
        self._end()
        self._told, self._places = timestep, 1
        if self._step is None or step <= self._step:
            self._drivers, self._combinations = [], {}
            self._watch.settle("the run before this one, which was interrupted")
        super().set_state(step, num_inference_steps, timestep)

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """One batch of inputs per pass of the step; classic pipelines and some modular ones call this."""
        return self._batches(lambda each: self._prepare_batch(data, each.inputs, each.name))

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """One batch of inputs per pass of the step; most modular pipelines call this."""
        return self._batches(
            lambda each: self._prepare_batch_from_block_state(input_fields, data, each.inputs, each.name)
        )

    def _batches(self, make: Any) -> list[Any]:
        self._told, again = None, self._told is None
        if again and self._places == 2 and self._passes and not self._count_prepared:
            return []  # the sound needs the same passes
        self._end()
        self._count_prepared, self._left = 0, self._places
        self._passes = passes = self._plan()
        batches = [make(each) for each in passes]
        for batch in batches:  # if the loop fails, its batches are freed, and that ends the step
            weakref.finalize(batch, abandon, weakref.ref(self), passes)
        return batches

    def prepare_models(self, denoiser: nn.Module) -> None:
        """The denoiser is about to be called for the next pass."""
        if self._count_prepared >= len(self._passes):
            raise SkipError(
                f"the pipeline makes more passes than the {len(self._passes)} it was given: guiders are driven by "
                f"set_state, prepare_inputs, then prepare_models and cleanup_models round each pass; {_BOTH_PLACES}"
            )
        now = self._passes[self._count_prepared]
        self._count_prepared += 1
        if self._live or (self.settings.schedule is not None and self.settings.schedule.blocks):
            self._driver = driver = self._driver_of(denoiser)
            driver.prepare(now, self._step_plan(driver).skipped, self._step)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """The denoiser was called. After the last skipped pass of the step its gates are removed."""
        if (driver := self._driver) is not None:
            self._driver = None
            driver.finish(last=not any(each.kind in ("skip", "weak") for each in self._passes[self._count_prepared :]))

    def _driver_of(self, denoiser: nn.Module) -> Driver:
        found = next((driver for driver in self._drivers if driver.model is denoiser), None)
        if found is None:
            self._refuse_cache(denoiser)
            found = Driver(self.settings, self._live, denoiser, self.stats)
            found.schedule.refuse_idle(self._num_inference_steps)
        self._drivers = [*(driver for driver in self._drivers if driver is not found), found]
        return found

    def _end(self, over: bool = False) -> None:
        self._passes, self._driver = (), None
        for driver in self._drivers:
            driver.end(over)

    def __call__(self, data: list[Any]) -> GuiderOutput:
        """Combine the predictions of a step's passes."""
        key = self._identifier_key
        found: dict[str, Any] = {str(getattr(each, key, None)): getattr(each, "noise_pred", None) for each in data}
        names = [each.name for each in self._passes]
        if not names or list(found) != names or any(value is None for value in found.values()):
            wanted = ", ".join(names) or "of a prepared step"
            raise SkipError(f"expected the predictions {wanted}; got {list(found)}: {_BOTH_PLACES}")
        self._modality = modality_of(data[0])
        if self._drivers and self.num_conditions < self._most_conditions and self._left == self._places:
            self._drivers[-1].passes.enter(1, ran=0, passes=0)  # the pass that was saved
        self._left = self._left - 1 if self._modality else 0
        over = self._step + 1 >= self._num_inference_steps
        try:
            if not self._modality:
                self._check_modalities((), "this pipeline")
            out = self.forward(**found)
            if self._live and self._enabled:
                self._watch.see_step(found, out.pred, self._step)
                if over and self._left < 1:
                    self._watch.settle()
            return out
        except BaseException:
            self._left = 0
            raise
        finally:
            if self._left < 1:
                self._end(over)
                if over:  # the run is over: hold neither its tensors nor the denoiser
                    self._drivers, self._combinations = [], {}

    def forward(
        self,
        pred_cond: Tensor,
        pred_uncond: Tensor | None = None,
        pred_cond_modality: Tensor | None = None,
        **skipped: Tensor,
    ) -> GuiderOutput:
        """The guided prediction, in the dtype of `pred_cond`.

        Args:
            pred_cond: c.
            pred_uncond: u, on steps with CFG.
            pred_cond_modality: of the pass with video and sound apart, where `modality_scale` asks for it.
            skipped: k of every group, `pred_cond_skip`, …; none where `every` uses the last differences again.
        """
        name, plan = self._modality, self._step_plan()
        if name not in self._combinations:
            self._combinations[name] = Combination(self.settings, self.stats, name)
        y = self._combinations[name].guided(plan, self.w, pred_cond, pred_uncond, list(skipped.values()))
        if pred_cond_modality is not None:
            y = y + (self._amount(self.modality_scale) - 1) * skip_direction(pred_cond, pred_cond_modality)
        y = rescale(y, widened(pred_cond), self._amount(self.guidance_rescale))
        return GuiderOutput(pred=y.to(pred_cond.dtype), pred_cond=pred_cond, pred_uncond=pred_uncond)
