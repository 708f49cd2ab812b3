"""Gate: the stand-in at one module's `forward`. It installs and removes itself and asks, at each call, what to do.

One gate per module, shared by everybody who needs it. A `ContextVar` holds the stack of active frames, so threads
and async tasks with different plans do not see each other. A frame maps modules to acts; an act is called instead
of the module, and decides whether the module runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from threading import RLock
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakValueDictionary, ref

import torch
from torch import nn

from skipguide.errors import LostGateError, SkipError
from skipguide.stats import Stats

Call = Callable[..., Any]
Handler = Callable[[Call, tuple[Any, ...], dict[str, Any]], Any]


class Act(Protocol):
    """What happens at a gate while a frame is active; `call` is the module, or the next act around it."""

    def __call__(self, frame: Frame, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the module would have returned."""


class Frame:
    """One active plan on one model: the acts by module, the ledger, and the batch size of the running pass."""

    __slots__ = ("acts", "batch", "names", "progress", "seen", "stats")

    def __init__(self, acts: dict[int, Act], names: dict[int, str], stats: Stats) -> None:
        self.acts = acts
        self.names = names
        self.stats = stats
        self.batch = 1
        self.seen: set[int] = set()
        self.progress: float | None = None


_ACTIVE: ContextVar[tuple[Frame, ...]] = ContextVar("skipguide_active_frames", default=())


@contextmanager
def activated(frame: Frame) -> Iterator[None]:
    """Put a frame on the stack of this thread or task, and take exactly this one off again."""
    _ACTIVE.set((*_ACTIVE.get(), frame))
    try:
        yield
    finally:
        _ACTIVE.set(tuple(other for other in _ACTIVE.get() if other is not frame))


class Gate:
    """Stands in for one module's `forward` (or for its compiled call, which is faster to skip from outside)."""

    # no __dict__: functools.update_wrapper of whoever wraps a gate would copy it
    __slots__ = ("__weakref__", "_module", "_own", "handlers", "inner", "key", "slot", "users")

    def __init__(self, module: nn.Module) -> None:
        self._module = ref(module)
        self.key = id(module)
        self.users = 0
        self.slot = "forward"
        self.inner: Call = _not_installed
        self._own = False  # whether the slot held something on the instance before
        self.handlers: tuple[Handler, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module as the handlers and the active frames say; without any, just run it."""
        call: Call = self._through_frames
        for handler in self.handlers:
            call = partial(_handle, handler, call)
        return call(*args, **kwargs)

    def _through_frames(self, *args: Any, **kwargs: Any) -> Any:
        frames = _ACTIVE.get()
        if not frames:
            return self.inner(*args, **kwargs)
        call: Call = partial(self._run, frames)
        for frame in frames:
            if not torch.compiler.is_compiling():
                frame.seen.add(self.key)
            act = frame.acts.get(self.key)
            if act is not None:
                call = partial(_apply, act, frame, call)
        return call(*args, **kwargs)

    def _run(self, frames: tuple[Frame, ...], *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            for frame in frames:
                name = frame.names.get(self.key)
                if name is not None:
                    frame.stats.ran(name, frame.batch)
        return self.inner(*args, **kwargs)

    @property
    def __wrapped__(self) -> Call:
        """The forward behind the gate, so that `inspect.signature(module.forward)` stays true."""
        return self.inner

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model is free of gates."""
        import copy

        return copy.deepcopy(self.inner, memo)

    def __reduce__(self) -> Any:
        """Pickling a model with an active plan would store the plan's machinery with it."""
        raise SkipError("this model has an active plan; leave the `with` block or call remove() before pickling it")

    # -- installation -------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Stand in for the module; the second user of the same gate just counts."""
        module = self.module
        with _LOCK:
            if self.users == 0:
                compiled = module.__dict__.get("_compiled_call_impl") is not None
                self.slot = "_compiled_call_impl" if compiled else "forward"
                self._own = self.slot in module.__dict__
                self.inner = getattr(module, self.slot)
                module.__dict__[self.slot] = self
                _IDLE.pop(module, None)
                _INSTALLED[self.key] = self
            elif not self.reachable():
                raise self.lost()
            self.users += 1

    def remove(self) -> None:
        """Put back what was there; a gate that somebody wrapped is cut out of their chain."""
        with _LOCK:
            self.users -= 1
            module = self._module()
            if self.users or module is None:
                return
            _INSTALLED.pop(self.key, None)
            _IDLE[module] = self
            if module.__dict__.get(self.slot) is self:
                if self._own:
                    module.__dict__[self.slot] = self.inner
                else:
                    del module.__dict__[self.slot]
            elif holders := _holders(module, self):
                for holder, name in holders:
                    setattr(holder, name, self.inner)
            else:
                return  # an unknown wrapper may still call this gate: it stays, and only passes calls on
            self.inner = _not_installed

    @property
    def module(self) -> nn.Module:
        """The gated module."""
        module = self._module()
        if module is None:
            raise LostGateError("the gated module no longer exists; apply the plan to the model in use")
        return module

    def reachable(self) -> bool:
        """Whether the gate can be seen to stand where it was installed, or in the chain of a known wrapper."""
        module = self.module
        return module.__dict__.get(self.slot) is self or bool(_holders(module, self))

    def lost(self, name: str = "") -> LostGateError:
        """The error for a gate that is no longer called."""
        module = self.module
        holder = module.__dict__.get(self.slot)
        owner = "its original forward is back (a hook installed earlier was removed after the plan was applied)"
        if holder is not None:
            target = getattr(holder, "func", holder)
            owner = f"{getattr(target, '__module__', '?')}.{getattr(target, '__qualname__', type(target).__name__)} is there"
        if (hook := module.__dict__.get("_hf_hook")) is not None:
            owner += f" (accelerate's {type(hook).__name__})"
        return LostGateError(
            f"the gate on {name or type(module).__name__} was replaced: {owner}. Apply skip plans after hooks and offloading "
            f"are set up, and remove them before those are removed."
        )


def _apply(act: Act, frame: Frame, call: Call, *args: Any, **kwargs: Any) -> Any:
    return act(frame, call, args, kwargs)


def _handle(handler: Handler, call: Call, *args: Any, **kwargs: Any) -> Any:
    return handler(call, args, kwargs)


def _holders(module: nn.Module, gate: Gate) -> list[tuple[Any, str]]:
    """Where the hook systems of accelerate and diffusers keep the forward that they wrapped."""
    places: list[tuple[Any, str]] = [(module, "_old_forward")]
    for reference in getattr(module.__dict__.get("_diffusers_hook"), "_fn_refs", ()):
        places += [(reference, "forward"), (reference, "original_forward")]
    return [(holder, name) for holder, name in places if getattr(holder, name, None) is gate]


def _not_installed(*args: Any, **kwargs: Any) -> Any:
    raise LostGateError("a removed gate was called: the model kept a reference to it in a way that is not known here")


# Idle gates are kept for as long as their module lives: torch.compile guards on their identity, so a plan that is
# switched on again finds the graph that was compiled for it. An installed gate refers to its module, so it is held
# by the module alone: a model that is dropped with its plan still on is freed.
_IDLE: WeakKeyDictionary[nn.Module, Gate] = WeakKeyDictionary()
_INSTALLED: WeakValueDictionary[int, Gate] = WeakValueDictionary()
_LOCK = RLock()


def gate_of(module: nn.Module) -> Gate:
    """The one gate of a module, installed or not."""
    with _LOCK:
        gate = _INSTALLED.get(id(module)) or _IDLE.get(module)
        if gate is None or gate._module() is not module:
            gate = _IDLE[module] = Gate(module)
        return gate
