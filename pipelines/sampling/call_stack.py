"""Call stack: which pipeline calls a shared denoiser, and what the variables of its running call are."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import nn

from skipguide.errors import SkipError
from skipguide.hosts.wrappers import unwrap


def is_called_by(pipe: Any, model: nn.Module, loop: tuple[str, str]) -> bool:
    """Whether the call of `model` that is running comes from `pipe`, not from another pipeline around the same model.

    Pipelines can share a denoiser, one can even run in another's callback, and the model's arguments do not tell them
    apart. The stack does: the nearest pipeline on it is the one that calls. It also tells the described loop, wherever
    it was called from, from a loop that a subclass or a method of another name brings along.

    Args:
        pipe: the pipeline that guidance is applied to.
        model: its denoiser.
        loop: module and qualified name of the described `__call__`.

    Raises:
        SkipError: if it comes from a loop that is not the described one, or from no pipeline.
    """
    found = ""
    for frame in _calls(loop[1]):
        who, code = _owner(frame), frame.f_code
        if who is pipe:
            if code.co_qualname == loop[1] and frame.f_globals.get("__name__") == loop[0]:
                return True
            found = found or f"{frame.f_globals.get('__name__')}.{code.co_qualname}"
        elif not found and _drives(who, model):
            return False
    name = type(pipe).__name__
    raise SkipError(
        f"guidance follows the loop {'.'.join(loop)}, and the denoiser was called "
        + (
            f"by another one, {found}"
            if found
            else "without it on the stack: is it called by something that is not a "
            "pipeline, by a method that is not __call__, or in a thread of its own?"
        )
        + f". What a call is for cannot be known then, and guessing would risk silently wrong guidance: describe the "
        f"class that has this loop as its __call__ with skipguide.pipelines.register_pipeline({name}, "
        f"PipelineSpec(...)), or remove the guidance before"
    )


def is_running(pipe: Any, thread: int | None = None) -> bool:
    """Whether this code, or another thread now, runs inside a call of the pipeline, for example in a callback."""
    top = None if thread is None else sys._current_frames().get(thread)
    if thread is not None and top is None:  # that thread has ended
        return False
    return any(_owner(frame) is pipe for frame in _calls(_function_name(pipe), top))


def look_up(pipe: Any, name: str, *, optional: bool = False) -> Any:
    """The value of an attribute of a pipeline or of a variable of its running call; None for an attribute it has not.

    Args:
        pipe: the pipeline.
        name: an attribute, or `"call.NAME"`, a variable of its `__call__`; `"!"` before it negates.
        optional: whether the call may lack that variable; it is None then.

    Raises:
        SkipError: if the variable is not there, or no call is running: None would count as "no CFG".
    """
    if name.startswith("!"):
        return not look_up(pipe, name[1:])
    if not name.startswith("call."):
        return getattr(pipe, name, None)
    variable = name.removeprefix("call.")
    frame = next((frame for frame in _calls(_function_name(pipe)) if _owner(frame) is pipe), None)
    known = {} if frame is None else frame.f_locals
    if variable not in known and not optional:
        raise SkipError(
            f"{variable} was to be read from the running {type(pipe).__name__}.__call__, "
            + ("which is not on the stack" if frame is None else "which has no variable of that name")
            + ": this pipeline is not driven as described. Describe it with skipguide.pipelines.register_pipeline"
        )
    return known.get(variable)


def _calls(name: str, top: FrameType | None = None) -> Iterator[FrameType]:
    """Every `__call__` on the stack from `top` on, and every function of that qualified name, innermost first."""
    frame: FrameType | None = top or sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__call__" or code.co_qualname == name:
            yield frame
        frame = frame.f_back


def _function_name(pipe: Any) -> str:
    """The qualified name of the function behind a pipeline's `__call__`, whatever was put around it."""
    function = inspect.unwrap(inspect.getattr_static(type(pipe), "__call__", look_up))
    return str(getattr(function, "__qualname__", ""))


def _owner(frame: FrameType) -> Any:
    """The object whose method runs in a frame."""
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def _drives(who: Any, model: nn.Module) -> bool:
    """Whether this is a pipeline (it has a scheduler) with the model among its components."""
    components = getattr(who, "__dict__", {})
    if "scheduler" not in components:
        return False
    bare = unwrap(model)
    return any(isinstance(part, nn.Module) and unwrap(part) is bare for part in components.values())
