"""Call stack: which pipeline calls a shared denoiser, and what the variables of its running call are."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

from torch import nn

from skipguide.hosts.wrappers import unwrap


def is_called_by(pipe: Any, model: nn.Module) -> bool:
    """Whether the call of `model` that is running comes from `pipe`, not from another pipeline around the same model.

    Pipelines can share a denoiser, one can even run in another's callback, and the model's arguments do not tell them
    apart. The stack does: the nearest pipeline on it is the one that calls. Without any, somebody calls the model
    directly, and stands for `pipe`.

    Args:
        pipe: the pipeline that guidance is applied to.
        model: its denoiser.
    """
    for known in _calls():
        who = known.get("self")
        if who is pipe:
            return True
        if _drives(who, model):
            return False
    return True


def is_running(pipe: Any) -> bool:
    """Whether this code runs inside a call of the pipeline, for example in a callback."""
    return any(known.get("self") is pipe for known in _calls())


def look_up(pipe: Any, name: str) -> Any:
    """The value of an attribute of a pipeline or of a variable of its running call; None if there is none.

    Args:
        pipe: the pipeline.
        name: an attribute, or `"call.NAME"`, a variable of its `__call__`; `"!"` before it negates.
    """
    if name.startswith("!"):
        return not look_up(pipe, name[1:])
    if not name.startswith("call."):
        return getattr(pipe, name, None)
    for known in _calls():
        if known.get("self") is pipe:
            return known.get(name.removeprefix("call."))
    return None


def _calls() -> Iterator[Mapping[str, Any]]:
    """The variables of every `__call__` on the stack, innermost first."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            yield frame.f_locals
        frame = frame.f_back


def _drives(who: Any, model: nn.Module) -> bool:
    """Whether this is a pipeline (it has a scheduler) with the model among its components."""
    components = getattr(who, "__dict__", {})
    if "scheduler" not in components:
        return False
    bare = unwrap(model)
    return any(isinstance(part, nn.Module) and unwrap(part) is bare for part in components.values())
