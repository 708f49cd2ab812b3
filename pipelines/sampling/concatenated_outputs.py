"""Outputs of a denoiser that predicts several things (video and sound), as one tensor and apart again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Size, Tensor

from skipguide.active import Call


class ConcatenatedOutputs:
    """Stands between guidance and the denoiser: its predictions side by side as one, `[B, N]`, and apart again.

    Guidance that treats every number alike (all but what looks at a whole prediction, such as a rescale) need not know.

    Attributes:
        sizes: how many numbers of a row belong to each prediction, as of the last call.
        device: where they are.
    """

    def __init__(self) -> None:
        self.call: Call | None = None
        self.sizes: tuple[int, ...] = ()
        self.device = torch.device("cpu")
        self._shapes: tuple[Size, ...] = ()
        self._names: tuple[type[Any], tuple[str, ...]] | None = None

    def around(self, call: Call) -> ConcatenatedOutputs:
        """The same, for this call of the denoiser."""
        self.call = call
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        """Run the denoiser and concatenate what it predicts."""
        assert self.call is not None
        out = self.call(*args, **kwargs)
        self._names = None if isinstance(out, tuple) else (type(out), tuple(out))
        predictions: tuple[Tensor, ...] = out if isinstance(out, tuple) else tuple(out.values())
        self._shapes = tuple(each.shape[1:] for each in predictions)
        self.device = predictions[0].device
        self.sizes = tuple(shape.numel() for shape in self._shapes)
        return (torch.cat([each.flatten(1) for each in predictions], dim=1),)

    def spread(self, scales: Iterable[float]) -> Tensor:
        """A scale of each prediction, for every number of a row; there may be fewer predictions than scales."""
        parts = zip(scales, self.sizes, strict=False)
        return torch.cat([torch.full((size,), scale, device=self.device) for scale, size in parts])

    def apart(self, out: tuple[Tensor]) -> Any:
        """The predictions in the form in which the denoiser returns them."""
        parts = out[0].split(self.sizes, dim=1)
        found = tuple(part.unflatten(1, shape) for part, shape in zip(parts, self._shapes, strict=True))
        if self._names is None:
            return found
        kind, names = self._names
        return kind(**dict(zip(names, found, strict=True)))
