"""Self-consistency: does the model itself, without CFG, take a clip for one of its own?

The finished latents z are noised to each noise level of a short run, all with the same noise, and the pipeline takes
one step from there, without CFG. Where the model thinks that the clip is one that it would make for this prompt, the
step leads to z noised to the next level. The error is the distance from there, relative to the length of the step,
averaged over the levels. The prompt margin is how much larger the error is without the prompt: whether the model sees
its prompt in the clip, as a diffusion classifier does (arXiv 2303.16203).

It is read off the pipeline's own loop by its own callback (`callback_on_step_end`), so that text, sizes and scheduler
are as in any other call.
"""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from skipguide.errors import SkipError

CALLBACK = "callback_on_step_end"
STEPS = 5  # of the short run; its first step begins at pure noise and says nothing about the clip
APART = 7919  # added to a seed: with the noise that it began from, a clip would be led back along its own path


def can_measure(pipeline_class: type) -> bool:
    """Whether a pipeline has the callback, and latents as an output."""
    taken = inspect.signature(pipeline_class.__call__).parameters
    return CALLBACK in taken and "output_type" in taken and "num_inference_steps" in taken


class LastLatents:
    """A callback that keeps the latents of the last step."""

    def __init__(self) -> None:
        self.latents: Tensor | None = None

    def __call__(self, pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keep them; nothing is changed."""
        if isinstance(kwargs.get("latents"), Tensor):
            self.latents = kwargs["latents"].detach().clone()
        return {}


class StepErrors:
    """A callback that measures each step, and sets the next one off from the noised clip.

    Args:
        latents: of the finished clip.
        generator: of the noise.

    Attributes:
        errors: of every step but the first, which begins at pure noise.
    """

    def __init__(self, latents: Tensor, generator: torch.Generator) -> None:
        self.latents = latents
        self.noise = torch.randn(latents.shape, generator=generator).to(latents)
        self.began: Tensor | None = None
        self.errors: list[float] = []

    def __call__(self, pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Note how far off the step was, and give back where the next one begins."""
        came = kwargs["latents"]
        if came.shape != self.latents.shape:
            raise SkipError(f"expected latents {tuple(self.latents.shape)}; got {tuple(came.shape)}")
        times = pipe.scheduler.timesteps
        last = step + 1 >= len(times)
        expected = self.latents if last else noised(pipe.scheduler, self.latents, self.noise, times[step + 1])
        if self.began is not None:
            length = (expected.float() - self.began.float()).norm()
            if length > 0:
                self.errors.append(float((came.float() - expected.float()).norm() / length))
        self.began = expected
        return {"latents": expected.to(came.dtype)}


def noised(scheduler: Any, latents: Tensor, noise: Tensor, timestep: Any) -> Tensor:
    """Latents at the noise level of a timestep, as the scheduler makes them.

    Raises:
        SkipError: for a scheduler that cannot.
    """
    times = torch.as_tensor(timestep).reshape(1).to(latents.device)
    if hasattr(scheduler, "scale_noise"):  # flow matching
        found: Tensor = scheduler.scale_noise(latents, times, noise)
        return found
    if hasattr(scheduler, "add_noise"):
        out: Tensor = scheduler.add_noise(latents, noise, times)
        return out
    raise SkipError(f"{type(scheduler).__name__} has neither scale_noise nor add_noise")


@torch.no_grad()
def self_consistency(
    pipe: Any,
    arguments: Mapping[str, Any],
    latents: Tensor,
    seed: int,
    steps: int = STEPS,
) -> float:
    """The self-consistency error of a clip; 0 is a clip that the model would leave as it is.

    Args:
        pipe: a stock diffusers pipeline with `callback_on_step_end`.
        arguments: of the call that made the clip (`LastLatents` keeps its latents), without its generator.
        latents: what the sampler ended with.
        seed: of the noise: the same for all clips that are compared.
        steps: of the short run.

    Raises:
        SkipError: for a scheduler that cannot noise latents, a run that has no step to measure, or predictions
            that are not finite.
    """
    generator = torch.Generator().manual_seed(seed + APART)
    watch = StepErrors(latents, generator)
    call = {**arguments, "num_inference_steps": steps, "output_type": "latent", CALLBACK: watch}
    if "guidance_scale" in inspect.signature(type(pipe).__call__).parameters:
        call["guidance_scale"] = 1.0
    pipe(**call, generator=torch.Generator().manual_seed(seed))
    if not watch.errors:
        raise SkipError(f"a run of {steps} steps has none to measure: the first one begins at pure noise")
    if not math.isfinite(error := statistics.fmean(watch.errors)):
        raise SkipError(f"the model's step from a noised clip is not finite: {watch.errors}")
    return error


def prompt_margin(error: float, pipe: Any, arguments: Mapping[str, Any], latents: Tensor, seed: int) -> float:
    """How much larger the self-consistency error of a clip is without the prompt; 0: it might be a clip of anything.

    Args:
        error: with the prompt, of `self_consistency`.
        pipe: as there.
        arguments: as there.
        latents: as there.
        seed: as there.

    Raises:
        SkipError: as there.
    """
    return self_consistency(pipe, {**arguments, "prompt": ""}, latents, seed) - error
