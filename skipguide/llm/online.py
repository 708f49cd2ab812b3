"""Online: the MLPs that prove themselves superfluous while a request is decoded.

Source: AdaSkip (arXiv 2501.02336), the online stage for decoding.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from skipguide.errors import SkipError


class OnlineWindow:
    """The first one-token passes of one request: how much each MLP that still runs changed the stream in them.

    Sums stay on the device; `decide` copies them to the host once.

    Args:
        passes: length of the window.
        num_layers: layers of the model.
        candidates: the layers whose MLP may be left out; the others are not measured.

    Attributes:
        similarity: per layer, mean cosine over the window, once it is full; NaN where the MLP was not measured.
        scale: per layer, mean growth of the stream's norm.
        given_up: several tokens were decoded at once before it was full: nothing is added to this sequence.
    """

    def __init__(self, passes: int, num_layers: int, candidates: Collection[int]) -> None:
        self.passes = passes
        self.candidates = frozenset(candidates)
        self.num_layers = num_layers
        self.seen = 0
        self.given_up = False
        self.similarity: tuple[float, ...] = ()
        self.scale: tuple[float, ...] = ()
        self._sums: dict[int, Tensor] = {}

    @property
    def full(self) -> bool:
        """Whether enough passes were seen."""
        return self.seen >= self.passes

    def enter(self, layer: int, part: str, before: Tensor, after: Tensor) -> None:
        """A listener for `watch`: the stream around a sublayer, [B, 1, D]; rows count alike."""
        if part != "mlp" or layer not in self.candidates:
            return
        before, after = before.detach().float(), after.detach().float()
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1, eps=1e-8).mean()
        growth = (after.norm(dim=-1) / before.norm(dim=-1)).mean()
        both = torch.stack([cosine, growth])
        self._sums[layer] = both if layer not in self._sums else self._sums[layer] + both.to(self._sums[layer].device)

    def decide(self, thresholds: Sequence[float]) -> dict[int, float]:
        """The MLPs to leave out from now on -> their scales.

        Args:
            thresholds: per layer, the least similarity at which its MLP is left out.

        Raises:
            SkipError: for a similarity that is not finite.
        """
        rows = [(math.nan, math.nan)] * self.num_layers
        if self._sums:
            device = next(iter(self._sums.values())).device
            means = torch.stack([value.to(device) for value in self._sums.values()]) / self.seen
            for layer, row in zip(self._sums, means.double().cpu().tolist(), strict=True):
                rows[layer] = tuple(row)
        self.similarity, self.scale = (tuple(column) for column in zip(*rows, strict=True))
        found = {}
        for layer in sorted(self._sums):
            similarity, scale = rows[layer]
            if not math.isfinite(similarity) or not math.isfinite(scale):
                raise SkipError(
                    f"the MLP of layer {layer} has similarity {similarity} and scale {scale} while decoding: the model "
                    "produces NaN or inf; run it in float32 or bfloat16"
                )
            if similarity >= thresholds[layer]:
                found[layer] = scale
        return found
