"""Run: one guider of diffusers, driven through the steps of a pipeline that knows nothing of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from skipguide.errors import SkipError
from skipguide.pipelines.registry.described import PipelineSpec
from skipguide.pipelines.sampling.grid import from_grid, grid_of
from skipguide.pipelines.sampling.modalities import Modalities

Images = Callable[..., Tensor]
# guiders that take a prediction for an image, and look at what lies beside what
_OF_IMAGES = ("FrequencyDecoupledGuidance",)
# guiders whose norms torch takes over two dimensions at most
_OF_ROWS = ("MagnitudeAwareGuidance",)


class GuiderRun:
    """A copy of a guider, with the state that it keeps of one run; where a denoiser predicts several things, one each.

    Args:
        guider: the user's, which stays as it is.
        spec: the pipeline.
    """

    def __init__(self, guider: Any, spec: PipelineSpec) -> None:
        self.name = type(guider).__name__
        self.spec = spec
        self.guiders = [copy.deepcopy(guider) for _ in range(max(len(spec.joined), 1))]
        names = {each.__name__ for each in type(guider).__mro__}
        self.of_images, self.of_rows = bool(names & {*_OF_IMAGES}), bool(names & {*_OF_ROWS})
        if self.of_images and spec.joined:
            raise SkipError(
                f"{self.name} takes a prediction for an image, and the denoiser predicts {len(spec.joined)} things of "
                f"different kinds ({', '.join(spec.joined)}): take another guider"
            )

    def begin(self, step: int, steps: int, timestep: Any) -> tuple[str, ...]:
        """A step begins; the predictions that it needs, in the guider's order."""
        names: tuple[str, ...] = ()
        for each in self.guiders:
            each.set_state(step=step, num_inference_steps=steps, timestep=timestep)
            asked = each.prepare_inputs({"inputs": ("conditional", "unconditional")})
            names = tuple(getattr(one, each._identifier_key) for one in asked)
        return names

    def enter(self, model: nn.Module) -> None:
        """The guider puts its hooks on for the pass that comes."""
        for each in self.guiders:
            each.prepare_models(model)

    def leave(self, model: nn.Module) -> None:
        """The pass is over."""
        for each in self.guiders:
            each.cleanup_models(model)

    def result(self, predictions: Mapping[str, Tensor], kwargs: Mapping[str, Any], modalities: Modalities) -> Tensor:
        """What the guider makes of a step's predictions.

        Args:
            predictions: name -> prediction, in float32 at least.
            kwargs: of the denoiser's call, which tell the grid of packed tokens.
            modalities: what is side by side in them.
        """

        def by(guider: Any) -> Images:
            def combine(*parts: Tensor) -> Tensor:
                named = dict(zip(predictions, parts, strict=True))
                if not self.spec.variances:
                    return self._of(guider, named, kwargs)
                means = {name: each.chunk(2, dim=1)[0] for name, each in named.items()}
                return torch.cat([self._of(guider, means, kwargs), parts[0].chunk(2, dim=1)[1]], dim=1)

            return combine

        return modalities.combined([by(guider) for guider in self.guiders], *predictions.values())

    def _of(self, guider: Any, predictions: Mapping[str, Tensor], kwargs: Mapping[str, Any]) -> Tensor:
        there, back = self._form(kwargs, next(iter(predictions.values())))
        key = guider._identifier_key
        data = [SimpleNamespace(**{key: name, "noise_pred": there(each)}) for name, each in predictions.items()]
        out = guider(data)
        return back(out.pred if hasattr(out, "pred") else out[0])

    def _form(self, kwargs: Mapping[str, Any], like: Tensor) -> tuple[Images, Images]:
        """Predictions in the form that the guider can take, and back."""
        if self.of_images:
            return self._images(kwargs, like)
        if self.of_rows:
            return lambda x: x.flatten(1)[:, None], lambda x: x.reshape(like.shape)
        return lambda x: x, lambda x: x

    def _images(self, kwargs: Mapping[str, Any], like: Tensor) -> tuple[Images, Images]:
        """Predictions as images `[B F, C, H, W]`, and back."""
        if (grid := grid_of(self.spec, kwargs, like)) is None:
            raise SkipError(
                f"{self.name} takes a prediction for an image, and where the tokens of this pipeline lie in it cannot "
                f"be told: take another guider"
            )
        frames, height, width = grid(like).shape[2:]
        undo = from_grid(self.spec)

        def there(x: Tensor) -> Tensor:
            return grid(x).transpose(1, 2).flatten(0, 1)

        def back(x: Tensor) -> Tensor:
            x = x[..., :height, :width]  # of a pyramid's image, whose sides are powers of two
            return undo(x.reshape(-1, frames, *x.shape[1:]).transpose(1, 2))

        return there, back
