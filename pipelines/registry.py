"""The described pipelines. One that is not here is refused, never guessed."""

from __future__ import annotations

from typing import Any

from skipguide.errors import SkipError
from skipguide.pipelines.pipeline_spec import PipelineSpec
from skipguide.pipelines.registry_image import IMAGE_PIPELINES
from skipguide.pipelines.registry_video import VIDEO_PIPELINES

__all__ = ["PIPELINES", "PipelineSpec", "pipeline_spec"]

PIPELINES: dict[str, PipelineSpec] = {**VIDEO_PIPELINES, **IMAGE_PIPELINES}


def pipeline_spec(pipe: Any) -> PipelineSpec:
    """The entry for a pipeline's class.

    Raises:
        SkipError: for an unknown pipeline, with those that are known.
    """
    for cls in type(pipe).__mro__:
        if (spec := PIPELINES.get(cls.__name__)) is not None:
            return spec
    raise SkipError(
        f"how {type(pipe).__name__} calls its denoiser is not described, and guessing would risk silently wrong "
        f"guidance. Described pipelines: {', '.join(PIPELINES)}"
    )
