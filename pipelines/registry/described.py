"""The described pipelines. One that is not here is refused, never guessed."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from skipguide.errors import SkipError
from skipguide.pipelines.registry.image import IMAGE_PIPELINES
from skipguide.pipelines.registry.refused import UNSUPPORTED_PIPELINES
from skipguide.pipelines.registry.spec import PipelineSpec
from skipguide.pipelines.registry.video import VIDEO_PIPELINES

__all__ = ["PIPELINES", "PipelineSpec", "pipeline_spec", "register_pipeline"]

PIPELINES: dict[str, PipelineSpec] = {**VIDEO_PIPELINES, **IMAGE_PIPELINES}
_REGISTERED: dict[str, PipelineSpec] = {}
_GROUP = "skipguide.pipelines"


def register_pipeline(pipeline_class: type | str, spec: PipelineSpec) -> None:
    """Describe how a pipeline of your own, or of a third party, calls its denoiser.

    A package can also name a function in the entry-point group `skipguide.pipelines`; it is called with no arguments
    when a pipeline is not known, and registers what it knows. The denoiser's blocks are described apart from it, with
    `skipguide.register_blocks`.

    Args:
        pipeline_class: the class, or its name; subclasses are covered.
        spec: how it calls its denoiser.

    Raises:
        SkipError: if `spec` is no `PipelineSpec`, or `pipeline_class` no class (of a pipeline: `type(pipe)`).

    Example:
        >>> class MyPipeline: ...
        >>> register_pipeline(MyPipeline, PipelineSpec("batched", layout="bchw"))
        >>> from skipguide.pipelines.registry import pipeline_spec
        >>> pipeline_spec(MyPipeline()).cfg
        'batched'
    """
    if not isinstance(spec, PipelineSpec):
        raise SkipError(f"register_pipeline expects a PipelineSpec; got {type(spec).__name__}")
    if not isinstance(pipeline_class, (type, str)):
        raise SkipError(f"register_pipeline expects a class or its name; got a {type(pipeline_class).__name__}")
    _REGISTERED[pipeline_class if isinstance(pipeline_class, str) else pipeline_class.__name__] = spec


def pipeline_spec(pipe: Any) -> PipelineSpec:
    """The entry for a pipeline's class.

    Raises:
        SkipError: for an unknown pipeline, with those that are known, and for one that is known not to work, with why.
    """
    found = _lookup(pipe)
    if found is None:
        for entry in entry_points(group=_GROUP):
            entry.load()()
        found = _lookup(pipe)
    if isinstance(found, PipelineSpec):
        return found
    name = type(pipe).__name__
    if found is not None:
        raise SkipError(
            f"{name} is not supported: {found}. If you know how it calls its denoiser, describe it with "
            f"skipguide.pipelines.register_pipeline({name}, PipelineSpec(...))"
        )
    raise SkipError(
        f"how {name} calls its denoiser is not described, and guessing would risk silently wrong guidance. Describe it "
        f"with skipguide.pipelines.register_pipeline({name}, PipelineSpec(...)), or take one of the described "
        f"pipelines: {', '.join(PIPELINES)}"
    )


def _lookup(pipe: Any) -> PipelineSpec | str | None:
    """The entry of the nearest class that has one, or why it has none."""
    for cls in type(pipe).__mro__:
        name = cls.__name__
        if (spec := _REGISTERED.get(name) or PIPELINES.get(name)) is not None:
            return spec
        if name != "DiffusionPipeline" and (reason := UNSUPPORTED_PIPELINES.get(name)) is not None:
            return reason
    return None
