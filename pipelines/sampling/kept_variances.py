"""Kept variances: the half of a prediction that guidance is not about stays what the denoiser predicted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skipguide.active import Call
from skipguide.pipelines.sampling.predictions import first, with_first


class KeptVariances:
    """Stands between guidance and the denoiser: what the first pass of a call says of variances is what is delivered.

    A scheduler that learned them takes those of the conditional branch; a skipped pass has others.
    """

    def __init__(self) -> None:
        self.call: Call | None = None
        self.seen: Tensor | None = None

    def around(self, call: Call) -> KeptVariances:
        """The same, for this call of the denoiser."""
        self.call, self.seen = call, None
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the denoiser, and remember the variances of its first pass."""
        assert self.call is not None
        out = self.call(*args, **kwargs)
        if self.seen is None:
            self.seen = first(out).chunk(2, dim=1)[1]
        return out

    def apart(self, out: Any) -> Any:
        """The answer with those variances; a pass of the conditional rows alone stands for both branches."""
        prediction = first(out)
        if self.seen is None:
            return out
        means, variances = prediction.chunk(2, dim=1)[0], self.seen[: len(prediction)]
        if len(variances) < len(prediction):
            variances = variances.repeat(2, *[1] * (variances.dim() - 1))
        self.seen = self.call = None
        return with_first(out, torch.cat([means, variances.to(means.dtype)], dim=1))
