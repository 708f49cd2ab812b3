"""Native pass: the pipeline's own skip guidance under ours: refused unless asked for, and told of where it idles."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from skipguide.errors import SkipError
from skipguide.pipelines.registry.spec import PipelineSpec

logger = logging.getLogger(__name__)


class NativePass:
    """Meets every call that is a pass of the pipeline's own skip guidance.

    Args:
        pipe: the pipeline.
        spec: how it drives its denoiser, and what marks such a call.
        model: the denoiser.
        wanted: whether the user asked for both.
    """

    def __init__(self, pipe: Any, spec: PipelineSpec, model: nn.Module, wanted: bool) -> None:
        self.name = type(pipe).__name__
        self.spec = spec
        self.wanted = wanted
        needs = spec.native_needs
        self.idle = (
            f"with {needs}=False in the denoiser's config it changes nothing" if spec.native_idles(model) else ""
        )

    def meet(self, kwargs: Mapping[str, Any]) -> None:
        """Look at the arguments of a call.

        Raises:
            SkipError: for such a pass: nobody asks for guidance on guidance without saying so.
        """
        if not self.spec.is_native(kwargs):
            return
        if self.wanted:
            if self.idle:
                logger.warning("%s makes a skip-guidance pass of its own, but %s: turn it off", self.name, self.idle)
                self.idle = ""  # once is enough
            return
        off = ", ".join(f"{name}={value}" for name, value in self.spec.native_off)
        idle = f" ({self.idle})" if self.idle else ""
        raise SkipError(
            f"{self.name} makes a skip-guidance pass of its own in this call{idle}, and this guidance would come on "
            f"top of it: turn the pipeline's off (call it with {off}); or keep the pipeline's alone, and have it "
            f"cheaper (PrefixReuse().apply(pipe)); or ask for both, apply(pipe, over_native=True)"
        )
