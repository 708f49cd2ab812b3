"""Grid: a denoiser's prediction as [B, C, F, H, W] and back, where the pipeline's way of laying it out is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from skipguide.pipelines.registry.described import PipelineSpec

Change = Callable[[Tensor], Tensor]
# layout -> how many dimensions it has, how it becomes [B, C, F, H, W], and how that becomes it
_LAYOUTS: dict[str, tuple[int, Change, Change]] = {
    "bcfhw": (5, lambda x: x, lambda x: x),
    "bfchw": (5, lambda x: x.transpose(1, 2), lambda x: x.transpose(1, 2)),
    "bfhwc": (5, lambda x: x.movedim(-1, 1), lambda x: x.movedim(1, -1)),
    "bchw": (4, lambda x: x[:, :, None], lambda x: x[:, :, 0]),
}


def grid_of(spec: PipelineSpec, kwargs: Mapping[str, Any], prediction: Tensor) -> Change | None:
    """How to bring a prediction into [B, C, F, H, W]; None if its grid cannot be told.

    Args:
        spec: the pipeline; its `layout` says how the dimensions lie.
        kwargs: of the denoiser's call; packed tokens have their sizes there.
        prediction: one prediction, for its shape.
    """
    if spec.layout in _LAYOUTS:
        dims, there, _ = _LAYOUTS[spec.layout]
        return there if prediction.dim() == dims else None
    sizes = _sizes(kwargs) if spec.layout == "tokens" and prediction.dim() == 3 else None
    if sizes is None or sizes[0] * sizes[1] * sizes[2] != prediction.shape[1]:
        return None
    return lambda x: x.transpose(1, 2).unflatten(2, sizes)


def from_grid(spec: PipelineSpec) -> Change:
    """How to bring what `grid_of` made back into the pipeline's own layout."""
    return _LAYOUTS[spec.layout][2] if spec.layout in _LAYOUTS else lambda x: x.flatten(2).transpose(1, 2)


def _sizes(kwargs: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Frames, height and width of packed tokens: LTX says them, Flux has them in the places of its tokens."""
    names = ("num_frames", "height", "width")
    if all(isinstance(kwargs.get(name), int) for name in names):
        frames, height, width = (int(kwargs[name]) for name in names)
        return frames, height, width
    if isinstance(places := kwargs.get("img_ids"), Tensor) and places.dim() == 2:
        height, width = (int(places[:, i].max()) + 1 for i in (1, 2))
        return 1, height, width
    return None
