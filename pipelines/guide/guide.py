"""Guide: any guider of diffusers on a stock pipeline, which has no place for one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from skipguide.config import VERSION, JsonConfig, check_keys, normalize_fields
from skipguide.errors import SkipError
from skipguide.pipelines.conflicts import denoisers_of, refuse_conflicts
from skipguide.pipelines.guide.applied import AppliedGuide
from skipguide.pipelines.guide.described import describe, is_guider, make
from skipguide.pipelines.guide.passes import refuse_unknown
from skipguide.pipelines.registry.described import pipeline_spec, stepping


@dataclass(frozen=True, eq=False)
class Guide(JsonConfig):
    """A guider of diffusers on a classic pipeline: `Guide(guider).apply(pipe)`.

    diffusers has guiders for modular pipelines. Here the same object decides what a stock pipeline's step gives: it is
    handed the denoiser's predictions, and its result is delivered through the branches that the pipeline combines by
    itself, solved for exactly. So the pipeline's own CFG scale has no effect beyond turning its unconditional pass on
    (set it above 1), and steps at which the guider needs no unconditional prediction skip that pass.

    Passes that a guider weakens are made here. Where it skips blocks, takes the identity for attention maps or blurs
    their queries, the pass starts at the first such block (exact, as `SpatiotemporalSkipGuidance` does it), on every
    model that has the part, also where the hooks of diffusers fail or exchange streams. What no plan of skipguide says
    (dropout below 1, attention or feed-forward alone) runs with the guider's own hooks, as whole passes. The weakened
    unconditional pass of `AutoGuidance` is, in a run without CFG, one on the conditional inputs, which is the paper's
    form (2406.02507).

    Args:
        guider: a `BaseGuidance` object of diffusers: `ClassifierFreeGuidance`, `AdaptiveProjectedGuidance`
            (2410.02416), `ClassifierFreeZeroStarGuidance` (2503.18886), `TangentialClassifierFreeGuidance`
            (2503.18137), `FrequencyDecoupledGuidance` (2506.19713), `MagnitudeAwareGuidance` (2508.03442),
            `AutoGuidance` (2406.02507), `PerturbedAttentionGuidance` (2403.17377), `SmoothedEnergyGuidance`
            (2408.00760), `SkipLayerGuidance`; or a class of your own with the same passes. It is copied, and stays as
            it is. Or what `to_dict` wrote of one: its class name and its config.
        prefix_reuse: start weakened passes at the first weakened block; exact at equal batch.

    Raises:
        SkipError: for something that is no guider, or one that asks for passes of an unknown kind.

    Example:
        >>> from diffusers import AdaptiveProjectedGuidance
        >>> guide = Guide(AdaptiveProjectedGuidance(guidance_scale=5.0, eta=0.0))
        >>> guide.to_dict()["guider"]["class"], Guide.from_dict(guide.to_dict()) == guide
        ('AdaptiveProjectedGuidance', True)
    """

    guider: Any
    prefix_reuse: bool = True

    def __post_init__(self) -> None:
        """Make a guider of its description, and refuse what is none."""
        normalize_fields(self, flags=("prefix_reuse",))
        if isinstance(self.guider, Mapping):
            object.__setattr__(self, "guider", make(self.guider))
        if not is_guider(self.guider):
            raise SkipError(
                f"expected a guider of diffusers (an object, such as AdaptiveProjectedGuidance(5.0)), or its class "
                f"name and config; got {self.guider if isinstance(self.guider, type) else type(self.guider).__name__}"
            )
        if type(self.guider).__name__ == "SkipGuider":
            raise SkipError("SkipGuider is for pipelines with a guider: take SpatiotemporalSkipGuidance here")
        refuse_unknown(self.guider)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the guider's class name and its config.

        Raises:
            SkipError: for a guider whose class is not one of diffusers.
        """
        return {"version": VERSION, "guider": describe(self.guider), "prefix_reuse": self.prefix_reuse}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote; an unknown or missing key, or another version, is an error."""
        check_keys(data, {"guider", "prefix_reuse"}, f"a {cls.__name__}")
        if not isinstance(data.get("guider"), Mapping):
            raise SkipError(f"expected a guider as its 'class' and its 'config'; got {data.get('guider')!r}")
        return cls(data["guider"], data.get("prefix_reuse", True))

    def __eq__(self, other: object) -> bool:
        """Whether the other has a guider of the same class with the same config."""
        if not isinstance(other, Guide):
            return NotImplemented
        return self.guider is other.guider or self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        """Equal guides have guiders of one class."""
        return hash(type(self.guider).__name__)

    def apply(self, pipe: Any, *, weak_model: nn.Module | None = None) -> AppliedGuide:
        """Apply to a pipeline, until `remove()` or the end of the `with` block.

        Args:
            pipe: a stock diffusers pipeline that is described in `skipguide.pipelines.registry.described`.
            weak_model: a smaller or less trained denoiser of the same inputs and outputs, which predicts in the
                unconditional pass's place (autoguidance, 2406.02507): what the guider itself weakens is left out then.
                With the pipeline's CFG on it gets the unconditional inputs, without CFG the conditional ones.

        Returns:
            A handle: context manager, `.remove()`, `.stats`.

        Raises:
            SkipError: for an unknown pipeline, guidance that is already applied, layers that its model does not have,
                or a guider that takes predictions for images where there are none; at the first step, for a run
                without the unconditional pass that the guider needs.
        """
        pipe = stepping(pipe)
        spec = pipeline_spec(pipe)
        names = denoisers_of(pipe, spec)
        refuse_conflicts(pipe, spec, names, "Guide")
        if spec.weight:
            raise SkipError(
                f"{type(pipe).__name__} guides by a second model's prediction, which a guider of diffusers does not "
                f"get: use SpatiotemporalSkipGuidance, which adds to what it does"
            )
        if weak_model is not None and not isinstance(weak_model, nn.Module):
            raise SkipError(f"expected weak_model as a denoiser, a torch module; got {type(weak_model).__name__}")
        applied = AppliedGuide(self, pipe, spec, names, weak_model)
        applied._install()
        return applied
