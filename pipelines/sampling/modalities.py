"""Modalities: guidance of several predictions that lie side by side in one, such as video and sound.

What treats every number alike (a direction, a scale, a shift) need not know of them. What looks at a whole prediction
(a rescale, a projection, CFG-Zero*) looks at each of them apart, and where the pipeline computes its guidance on
denoised samples x0 = sample - sigma v, it looks at these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from skipguide import guidance
from skipguide.errors import SkipError
from skipguide.guidance import Over
from skipguide.pipelines.groups import SkipGroup
from skipguide.pipelines.registry.spec import PipelineSpec
from skipguide.pipelines.sampling.call_stack import look_up
from skipguide.pipelines.sampling.concatenated_outputs import ConcatenatedOutputs
from skipguide.pipelines.sampling.pipeline_call import PipelineCall


class Modalities:
    """The predictions of one denoiser, apart.

    Args:
        pipe: the pipeline.
        spec: how it drives its denoiser.
        state: of its call.
        outputs: what lays the predictions side by side; None where there is one.
    """

    def __init__(self, pipe: Any, spec: PipelineSpec, state: PipelineCall, outputs: ConcatenatedOutputs | None) -> None:
        self.pipe = pipe
        self.spec = spec
        self.state = state
        self.outputs = outputs

    def spread(self, scale: float | Mapping[str, float]) -> float | Tensor:
        """A scale for every number of a prediction: itself, or that of the modality which the number belongs to."""
        if not isinstance(scale, Mapping):
            return scale
        assert self.outputs is not None  # `check_modalities` refuses the others
        return self.outputs.spread(scale[name] for name in self.spec.modalities)  # sound may be switched off

    def rescaled(self, y: Tensor, c: Tensor, amount: float, over: Over) -> Tensor:
        """Each prediction with its deviation brought towards that of c."""
        if amount == 0:
            return y

        def each(sample: Tensor | None, sigma: float, y: Tensor, c: Tensor) -> Tensor:
            made = guidance.rescale(_denoised(y, sample, sigma), _denoised(c, sample, sigma), amount, over)
            return _velocity(made, sample, sigma)

        return self._each(each, y, c)

    def projected(self, d: Tensor, c: Tensor, eta: float | None, norm: float | None) -> Tensor:
        """Each direction with its part along c weakened, and its norm bounded."""
        if eta is None and norm is None:
            return d

        def each(sample: Tensor | None, sigma: float, d: Tensor, c: Tensor) -> Tensor:
            if sample is None:
                return guidance.apg(d, c, eta, norm)
            return guidance.apg(-sigma * d, _denoised(c, sample, sigma), eta, norm) / -sigma

        return self._each(each, d, c)

    def starred(self, u: Tensor, c: Tensor) -> Tensor:
        """Each unconditional prediction with CFG-Zero*'s factor."""

        def each(sample: Tensor | None, sigma: float, u: Tensor, c: Tensor) -> Tensor:
            u, c = _denoised(u, sample, sigma), _denoised(c, sample, sigma)
            return _velocity(guidance.zero_star_scale(u, c) * u, sample, sigma)

        return self._each(each, u, c)

    def combined(self, combine: Sequence[Callable[..., Tensor]], *predictions: Tensor) -> Tensor:
        """What functions make of several predictions, one function for each modality."""
        own = iter(combine)

        def each(sample: Tensor | None, sigma: float, *parts: Tensor) -> Tensor:
            made = next(own)(*(_denoised(part, sample, sigma) for part in parts))
            return _velocity(made, sample, sigma)

        return self._each(each, *predictions)

    def _each(self, function: Callable[..., Tensor], *predictions: Tensor) -> Tensor:
        sizes = None if self.outputs is None else self.outputs.sizes
        parts = [(each,) if sizes is None else each.split(sizes, dim=1) for each in predictions]
        samples = [self._sample(name, part) for name, part in zip(self.spec.noisy, parts[0], strict=False)]
        samples += [None] * (len(parts[0]) - len(samples))
        sigma = self.state.sigma(self.pipe) if self.spec.noisy else 0.0
        made = [function(sample, sigma, *own) for sample, *own in zip(samples, *parts, strict=True)]
        return made[0] if sizes is None else torch.cat(made, dim=1)

    def _sample(self, name: str, prediction: Tensor) -> Tensor | None:
        """The noisy sample that a prediction is about, as the pipeline holds it.

        Raises:
            SkipError: if it is of another size.
        """
        sample: Tensor = look_up(self.pipe, name)
        if self.outputs is not None:
            sample = sample.flatten(1)
        if sample.shape != prediction.shape:
            raise SkipError(
                f"{name} of {type(self.pipe).__name__} is {tuple(sample.shape)}, and its denoiser predicted "
                f"{tuple(prediction.shape)}: what looks at denoised samples (rescale, apg, zero_star) cannot be "
                f"computed; leave it off"
            )
        return sample.to(torch.promote_types(sample.dtype, torch.float32))


def _denoised(v: Tensor, sample: Tensor | None, sigma: float) -> Tensor:
    return v if sample is None else sample - sigma * v


def _velocity(x: Tensor, sample: Tensor | None, sigma: float) -> Tensor:
    return x if sample is None else (sample - x) / sigma


def check_modalities(groups: Sequence[SkipGroup], modalities: Sequence[str], who: str) -> None:
    """Refuse scales for modalities that a pipeline does not have, and for some of its own only.

    Args:
        groups: of the guidance.
        modalities: what the pipeline's denoiser predicts; none where that is one thing.
        who: the pipeline, for the error.

    Raises:
        SkipError: saying what it has.
    """
    for group in groups:
        if isinstance(group.scale, Mapping):
            check_names("scale", group.scale, modalities, who)


def check_names(what: str, value: Mapping[str, Any], modalities: Sequence[str], who: str) -> None:
    """Refuse a mapping that has not one value for each modality.

    Raises:
        SkipError: saying what the pipeline has.
    """
    if not modalities:
        raise SkipError(f"{what} has a value each for {', '.join(value)}, and {who} predicts one thing: give a number")
    if set(value) != set(modalities):
        raise SkipError(
            f"{what} has a value each for {', '.join(value)}; {who} predicts {' and '.join(modalities)}: give one for "
            f"each, or a number for all"
        )
