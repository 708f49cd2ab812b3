"""Spatiotemporal Skip Guidance on stock diffusers pipelines (arXiv 2411.18664): no fork, no training."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from skipguide.blocks import find_blocks
from skipguide.config import JsonConfig
from skipguide.errors import SkipError
from skipguide.gate import gate_of
from skipguide.guidance import Over
from skipguide.pipelines.interceptor import Interceptor
from skipguide.pipelines.ledger import GuidanceCost, GuidanceStats
from skipguide.pipelines.presets import find_preset
from skipguide.pipelines.registry import PipelineSpec, pipeline_spec
from skipguide.pipelines.run import Run
from skipguide.plan import Part, Schedule, SkipPlan

Formula = Literal["stg", "uncond", "wan"]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SpatiotemporalSkipGuidance(JsonConfig):
    """Guide a diffusion pipeline away from its own prediction with some layers skipped.

    With c, u, k the conditional, unconditional and skipped predictions, w the pipeline's CFG scale and s `scale`, every
    step yields u + w (c - u) + s (c - k), or c + s (c - k) without CFG (section 3.2 of the paper). The skipped pass is
    run from the first skipped layer on only.

    Args:
        layers: blocks to skip, in execution order over all stacks; a mapping gives each denoiser its own. None takes
            the model's preset.
        scale: s. 0 leaves the pipeline as it is, to the bit.
        part: `"block"` (the paper's STG-R), `"attn_identity"` (STG-A), `"attn"`, `"cross_attn"` or `"mlp"`.
        formula: `"stg"` as above; `"uncond"` skips the layers in the unconditional pass itself, so there is no third
            pass (`scale` is 1 or 0); `"wan"` is what the authors' Wan code does: y0 + s (y0 - k) with y0 the CFG
            result and k skipped with the negative prompt.
        rescale: 0 to 1, brings the standard deviation of the result towards that of c (0.7 in the authors' code).
        rescale_over: `"sample"` or, as the authors' code does, the whole `"batch"`.
        start: first step with guidance, as a fraction of the steps (inclusive).
        stop: end of the guidance, as a fraction of the steps (exclusive; 1.0 is the end).
        every: compute the skipped pass on every k-th step only and reuse the last difference in between: cheaper and
            approximate.
        prefix_reuse: run the skipped pass from the first skipped layer on only (exact at equal batch; equal to
            rounding where CFG is one batch).

    Raises:
        SkipError: on settings that cannot mean anything; `apply` checks those that depend on the model.

    Example:
        >>> stg = SpatiotemporalSkipGuidance(layers=[19], scale=1.0)
        >>> SpatiotemporalSkipGuidance.from_dict(stg.to_dict()) == stg
        True
    """

    layers: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    scale: float = 1.0
    part: Part = "block"
    formula: Formula = "stg"
    rescale: float = 0.0
    rescale_over: Over = "sample"
    start: float = 0.0
    stop: float = 1.0
    every: int = 1
    prefix_reuse: bool = True

    def __post_init__(self) -> None:
        """Check everything that does not need a model."""
        if isinstance(self.layers, Mapping):
            per_denoiser = {name: self._layers(layers) for name, layers in self.layers.items()}
            object.__setattr__(self, "layers", {name: list(layers) for name, layers in per_denoiser.items()})
        elif self.layers is not None:
            object.__setattr__(self, "layers", self._layers(self.layers))
        if not _is_finite(self.scale):
            raise SkipError(f"scale must be a finite number; got {self.scale!r}")
        if self.formula not in get_args(Formula):
            raise SkipError(f"unknown formula {self.formula!r}; expected one of {', '.join(get_args(Formula))}")
        if not (_is_finite(self.rescale) and 0 <= self.rescale <= 1):
            raise SkipError(f"rescale must lie in 0 to 1; got {self.rescale!r}")
        if self.rescale_over not in get_args(Over):
            raise SkipError(f"unknown rescale_over {self.rescale_over!r}; expected one of {', '.join(get_args(Over))}")
        Schedule(self.start, self.stop, self.every)
        if self.formula == "uncond" and (self.scale not in (0, 1) or self.rescale or self.every != 1):
            raise SkipError(
                "formula='uncond' has no third pass, so scale (1 or 0), rescale and every have nothing to act on: "
                f"leave them at their defaults; got scale={self.scale}, rescale={self.rescale}, every={self.every}"
            )

    def _layers(self, layers: Sequence[int]) -> tuple[int, ...]:
        checked = SkipPlan(tuple(layers) if not isinstance(layers, int) else (layers,), part=self.part).layers
        if not checked:
            raise SkipError(
                "layers is empty, so nothing would be skipped: name at least one block, or None for the preset"
            )
        return tuple(checked)

    def apply(self, pipe: Any) -> AppliedGuidance:
        """Apply to a pipeline: from now on, and until `remove()` or the end of the `with` block, its calls are guided.

        Args:
            pipe: a stock diffusers pipeline that is described in `skipguide.pipelines.registry`.

        Returns:
            A handle: context manager, `.remove()`, `.stats`, `.delivery`.

        Raises:
            SkipError: for an unknown pipeline, a layer or part that its model does not have, a model without
                a preset, guidance that is already applied, or a cache that would mix up the passes.
        """
        spec = pipeline_spec(pipe)
        names = self._denoisers(pipe, spec)
        layers = {name: self._layers_of(pipe, name) for name in names}
        self._refuse_conflicts(pipe, spec, names)
        applied = AppliedGuidance(self, pipe, spec, layers)
        applied._install()
        return applied

    def cost(self, pipe: Any, *, guidance: bool = True) -> GuidanceCost:
        """What this will cost on a pipeline, before running it.

        Args:
            pipe: the pipeline.
            guidance: whether CFG is on (two branches per step) or off (one).
        """
        spec = pipeline_spec(pipe)
        name = self._denoisers(pipe, spec)[0]
        blocks = find_blocks(getattr(pipe, name))
        layers = self._layers_of(pipe, name)
        removed = len(layers) if self.part == "block" else 0
        n, plain = len(blocks), (2 if guidance else 1) * len(blocks)
        share = (self.stop - self.start) * (self.scale != 0)
        if self.formula == "uncond":
            return GuidanceCost(plain / n, plain - share * removed, plain, plain)
        tail = (n - min(layers) if self.prefix_reuse else n) - removed
        share /= self.every
        return GuidanceCost(plain / n + share * tail / n, plain + share * tail, plain, plain + n)

    def _denoisers(self, pipe: Any, spec: PipelineSpec) -> list[str]:
        names = [name for name in spec.denoisers if getattr(pipe, name, None) is not None]
        if not names:
            raise SkipError(f"this {type(pipe).__name__} has no denoiser: {' and '.join(spec.denoisers)} are None")
        return names

    def _layers_of(self, pipe: Any, denoiser: str) -> tuple[int, ...]:
        model = getattr(pipe, denoiser)
        if isinstance(self.layers, Mapping):
            if denoiser not in self.layers:
                raise SkipError(
                    f"layers names {sorted(self.layers)}, but this pipeline also has a denoiser {denoiser!r}"
                )
            layers = self._layers(self.layers[denoiser])
        else:
            layers = tuple(self.layers) if self.layers is not None else find_preset(model).layers
        find_blocks(model).select(layers, self.part)
        return layers

    def _refuse_conflicts(self, pipe: Any, spec: PipelineSpec, names: list[str]) -> None:
        for name in names:
            model = getattr(pipe, name)
            if any(isinstance(handler, Interceptor) for handler in gate_of(model).handlers):
                raise SkipError(
                    f"guidance is already applied to pipe.{name}: call remove() on the earlier handle first"
                )
            if getattr(model, "is_cache_enabled", False):
                raise SkipError(
                    f"pipe.{name} has a diffusers cache enabled, which would store the results of skipped passes: call "
                    f"pipe.{name}.disable_cache() first"
                )
        if spec.cfg == "guider":
            guider = getattr(pipe, "guider", None)
            if type(guider).__name__ != "ClassifierFreeGuidance" or getattr(guider, "use_original_formulation", False):
                raise SkipError(
                    f"expected pipe.guider to be ClassifierFreeGuidance with use_original_formulation=False; got "
                    f"{type(guider).__name__}: other guiders combine the branches in ways that a shift does not survive"
                )


class AppliedGuidance:
    """Guidance in force on a pipeline. Leave the `with` block or call `remove()` to end it.

    Attributes:
        stats: passes, blocks and seconds so far, and the delivery.
        layers: denoiser -> blocks skipped in it.
    """

    def __init__(
        self,
        settings: SpatiotemporalSkipGuidance,
        pipe: Any,
        spec: PipelineSpec,
        layers: dict[str, tuple[int, ...]],
    ) -> None:
        self.settings = settings
        self.layers = layers
        self.stats = GuidanceStats(delivery="solve" if settings.rescale or settings.formula == "wan" else "shift")
        run = Run()
        self._interceptors = [Interceptor(settings, pipe, spec, name, layers[name], run, self.stats) for name in layers]
        self._installed: list[Interceptor] = []

    @property
    def delivery(self) -> str:
        """How the guidance reaches the pipeline: `"shift"` or `"solve"`."""
        return self.stats.delivery

    def _install(self) -> None:
        try:
            for interceptor in self._interceptors:
                interceptor.install()
                self._installed.append(interceptor)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """End the guidance; nothing of it is left on the pipeline. A second call does nothing."""
        while self._installed:
            self._installed.pop().remove()

    def __enter__(self) -> AppliedGuidance:
        """Return the handle."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        """End the guidance."""
        self.remove()
        if kind is None and self.stats.passes == 0:
            logger.warning(
                "skip guidance was applied, but the denoiser it was applied to was never called: was the pipeline's "
                "denoiser exchanged inside the with block?"
            )


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
