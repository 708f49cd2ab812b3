"""The described pipelines. One that is not here is refused, never guessed."""

from __future__ import annotations

import inspect
from importlib.metadata import entry_points
from typing import Any

from torch import nn

from skipguide.errors import SkipError
from skipguide.pipelines.registry.image import IMAGE_PIPELINES
from skipguide.pipelines.registry.refused import UNSUPPORTED_PIPELINES
from skipguide.pipelines.registry.spec import PipelineSpec
from skipguide.pipelines.registry.unet import UNET_PIPELINES
from skipguide.pipelines.registry.video import VIDEO_PIPELINES

__all__ = ["PIPELINES", "PipelineSpec", "described_loop", "native_off", "pipeline_spec", "register_pipeline"]

PIPELINES: dict[str, PipelineSpec] = {**VIDEO_PIPELINES, **IMAGE_PIPELINES, **UNET_PIPELINES}
# By module and name of the class, so that one defined again (a notebook cell that runs twice) is still known and one of
# another module is not taken for it; a name that was given instead of the class stands for all classes of that name.
_REGISTERED: dict[tuple[str, str] | str, PipelineSpec] = {}
_GROUP = "skipguide.pipelines"
_HOME = "diffusers"


def register_pipeline(pipeline_class: type | str, spec: PipelineSpec) -> None:
    """Describe how a pipeline of your own, or of a third party, calls its denoiser.

    A package can also name a function in the entry-point group `skipguide.pipelines`; it is called with no arguments
    when a pipeline is not known, and registers what it knows. The denoiser's blocks are described apart from it, with
    `skipguide.register_blocks`.

    Args:
        pipeline_class: the class, or its name, which stands for the classes of that name in every module. Subclasses
            are covered if they inherit its `__call__`, or have one that calls it through `super()`. A subclass with a
            loop of its own is refused when it calls its denoiser, until it is registered itself.
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
    _REGISTERED[pipeline_class if isinstance(pipeline_class, str) else _key(pipeline_class)] = spec


def pipeline_spec(pipe: Any) -> PipelineSpec:
    """The entry for a pipeline's class.

    Raises:
        SkipError: for an unknown pipeline, with those that are known, and for one that is known not to work, with why.
    """
    return _described(pipe)[1]


def native_off(pipe: Any) -> dict[str, Any]:
    """The arguments of a pipeline's call that turn its own skip guidance off; none where none is known."""
    found = _lookup(pipe)
    return dict(found[1].native_off) if found is not None and isinstance(found[1], PipelineSpec) else {}


def described_loop(pipe: Any) -> tuple[str, str]:
    """The loop that the entry of a pipeline describes: module and qualified name of the described class's `__call__`.

    Raises:
        SkipError: as `pipeline_spec` does.
    """
    described = _described(pipe)[0]
    owner = next((cls for cls in described.__mro__ if "__call__" in vars(cls)), described)
    if not _is_stock(owner):  # its function may have any name; of a stock class, others may have put theirs in place
        function = inspect.unwrap(vars(owner).get("__call__", owner))
        if inspect.isfunction(function):
            return str(function.__globals__.get("__name__")), function.__code__.co_qualname
    return owner.__module__, f"{owner.__qualname__}.__call__"


def refuse_no_pipeline(pipe: Any) -> None:
    """Refuse what is given in place of a pipeline: its denoiser, its class, its name, nothing.

    Raises:
        SkipError: saying what came.
    """
    if pipe is None or isinstance(pipe, (nn.Module, type, str, int, float, list, tuple, dict)):
        name = pipe.__name__ if isinstance(pipe, type) else type(pipe).__name__
        got = f"the class {name}" if isinstance(pipe, type) else "None" if pipe is None else f"a {name}"
        part = ", which is a part of one" if isinstance(pipe, nn.Module) else ""
        raise SkipError(f"expected a pipeline of diffusers; got {got}{part}: pass the pipeline that calls the denoiser")


def _described(pipe: Any) -> tuple[type, PipelineSpec]:
    """The nearest class of a pipeline that has an entry, and the entry."""
    found = _lookup(pipe)
    if found is None:
        for entry in entry_points(group=_GROUP):
            entry.load()()
        found = _lookup(pipe)
    cls, name = type(pipe), type(pipe).__name__
    if found is not None:
        if isinstance(found[1], PipelineSpec):
            return found[0], found[1]
        raise SkipError(
            f"{name} is not supported: {found[1]}. If you know how it calls its denoiser, describe it with "
            f"skipguide.pipelines.register_pipeline({name}, PipelineSpec(...))"
        )
    refuse_no_pipeline(pipe)
    namesake = f" (it is the {name} of {cls.__module__}, not that of {_HOME})" if name in PIPELINES else ""
    raise SkipError(
        f"how {name} calls its denoiser is not described{namesake}, and guessing would risk silently wrong guidance. "
        f"Describe it with skipguide.pipelines.register_pipeline({name}, PipelineSpec(...)), or take one of the "
        f"described pipelines: {', '.join(PIPELINES)}"
    )


def _lookup(pipe: Any) -> tuple[type, PipelineSpec | str] | None:
    """The nearest class that has an entry, and the entry or why it has none."""
    for cls in type(pipe).__mro__:
        name = cls.__name__
        if (own := _REGISTERED.get(_key(cls)) or _REGISTERED.get(name)) is not None:
            return cls, own
        if not _is_stock(cls):  # a fork keeps the name of what it was forked from
            continue
        if (spec := PIPELINES.get(name)) is not None:
            return cls, spec
        if name != "DiffusionPipeline" and (reason := UNSUPPORTED_PIPELINES.get(name)) is not None:
            return cls, reason
    return None


def _key(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def _is_stock(cls: type) -> bool:
    """Whether a class is one of diffusers itself."""
    return cls.__module__.partition(".")[0] == _HOME
