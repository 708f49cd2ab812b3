"""Gate: the stand-in at one module's `forward`. It installs and removes itself and asks, at each call, what to do.

One gate per module, shared by everybody who needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary, ref

import torch
from torch import nn

from skipguide.active import Act, Call, Frame, active_frames
from skipguide.errors import LostGateError, SkipError

Handler = Callable[[Call, tuple[Any, ...], dict[str, Any]], Any]


class Gate:
    """Stands in for one module's `forward` (or for its compiled call, which is faster to skip from outside)."""

    # no __dict__: functools.update_wrapper of whoever wraps a gate would copy it
    __slots__ = ("__weakref__", "_module", "_own", "handlers", "inner", "key", "slot", "users")

    def __init__(self, module: nn.Module) -> None:
        self._module = ref(module)
        self.key = id(module)
        self.users = 0
        self.slot = "forward"
        self.inner: Call = partial(_through_module, self._module)
        self._own = False  # whether the slot held something on the instance before
        self.handlers: tuple[Handler, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module as the handlers and the active frames say; without any, just run it."""
        if not self.handlers:
            return self._through_frames(*args, **kwargs)
        call: Call = self._through_frames
        for handler in self.handlers:
            call = partial(_handle, handler, call)
        return call(*args, **kwargs)

    def _through_frames(self, *args: Any, **kwargs: Any) -> Any:
        frames = active_frames()
        if not frames:
            return self.inner(*args, **kwargs)
        call: Call = partial(self._run, frames)
        if len(frames) == 1 and (frame := frames[0]).live:  # what every step of a decoding model goes through
            if not torch.compiler.is_compiling():
                frame.saw(self)
            only = frame.acts.get(self.key)
            return call(*args, **kwargs) if only is None else only(frame, call, args, kwargs)
        for frame in frames:
            if not frame.live:
                continue
            if not torch.compiler.is_compiling():
                frame.saw(self)
            act = frame.acts.get(self.key)
            if act is not None:
                call = partial(_apply, act, frame, call)
        return call(*args, **kwargs)

    def _run(self, frames: tuple[Frame, ...], *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            for frame in frames:
                name = frame.names.get(self.key)
                if name is not None and frame.live:
                    frame.stats.ran(name, frame.present)
                    if frame.groups is not None:
                        frame.groups.runs(self.module)
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

    def install(self, inside: bool = False) -> None:
        """Stand in for the module; the second user of the same gate just counts.

        A hook of diffusers that changes what the module is given or gives, or that takes itself off in a run, stays
        in front of the gate; one that loads weights stays behind it, so that nothing is loaded for a skipped module.

        Args:
            inside: stand behind accelerate's hook, not in front of it, where there is one. Pipelines with model
                offload take that hook off and put it on again after every run.
        """
        module = self.module
        with _LOCK:
            if self.users == 0:
                holder: Any = module
                self.slot = "forward"
                if (place := _behind_hooks(module)) is not None:
                    holder, name = place
                elif module.__dict__.get("_compiled_call_impl") is not None:
                    name = self.slot = "_compiled_call_impl"
                else:
                    name = self.slot = "_old_forward" if inside and "_old_forward" in module.__dict__ else "forward"
                self._own = name in holder.__dict__
                self.inner = getattr(holder, name)
                holder.__dict__[name] = self
                _IDLE.pop(module, None)
                _INSTALLED[self.key] = self
            elif not self.reachable():
                raise self.lost()
            self.users += 1

    def settle(self) -> None:
        """Move in front of what came while the gate stood: a compiled call, or diffusers' group offloading.

        Inside the compiled call every block's gate would be another constant, and every block another graph. Behind
        group offloading, blocks would be loaded to be skipped.
        """
        attributes = self.module.__dict__
        compiled = attributes.get("_compiled_call_impl") is not None and attributes.get("forward") is self
        if compiled or _is_behind_offload(self, self.module):
            with _LOCK:
                users, self.users = self.users, 1
                self.remove()
                self.install()
                self.users = users

    def remove(self) -> None:
        """Put back what was there; a gate that somebody wrapped is cut out of their chain."""
        with _LOCK:
            self.users -= 1
            module = self._module()
            if self.users or module is None:
                return
            _INSTALLED.pop(self.key, None)
            holders = self._holders(module)
            for holder, name in holders:
                if holder is module and name == "forward" and not self._own:
                    del module.__dict__[name]
                else:
                    setattr(holder, name, self.inner)
            if holders:
                if (wrapper := self._wrapper(module)) is not None:
                    wrapper.__wrapped__ = self.inner
                # a call that is on its way through this gate in another thread still finds the module
                self.inner = partial(_through_module, self._module)
                _IDLE[module] = self
            # otherwise an unknown wrapper may still call this gate: it stays with them, and only passes calls on

    @property
    def module(self) -> nn.Module:
        """The gated module."""
        module = self._module()
        if module is None:
            raise LostGateError("the gated module no longer exists; apply the plan to the model in use")
        return module

    @property
    def outermost(self) -> bool:
        """Whether the gate is all that sees the module's input and output: no wrapper around it, no hook."""
        module = self.module
        return module.__dict__.get(self.slot) is self and not module._forward_hooks and not module._forward_pre_hooks

    def reachable(self) -> bool:
        """Whether the gate stands where it was installed, or in the chain of a wrapper that shows what it wraps."""
        module = self.module
        return bool(self._holders(module)) or self._wrapper(module) is not None

    def _holders(self, module: nn.Module) -> list[tuple[Any, str]]:
        """Where this gate is: on the module, or where accelerate and diffusers keep the forward they wrapped."""
        places: list[tuple[Any, str]] = [(module, self.slot), (module, "forward"), (module, "_old_forward")]
        for reference in getattr(module.__dict__.get("_diffusers_hook"), "_fn_refs", ()):
            places += [(reference, "forward"), (reference, "original_forward")]
        return [(holder, name) for holder, name in dict.fromkeys(places) if holder.__dict__.get(name) is self]

    def _wrapper(self, module: nn.Module) -> Any:
        """Who names this gate as what it wraps (functools.wraps), along the chain from the module's forward."""
        wrapper = module.__dict__.get("forward")
        while wrapper is not None and not isinstance(wrapper, Gate):
            if (inner := getattr(wrapper, "__wrapped__", None)) is self:
                return wrapper
            wrapper = inner
        return None

    def lost(self, name: str = "") -> LostGateError:
        """The error for a gate that is no longer called."""
        module = self.module
        now = module.__dict__.get(self.slot)
        owner = f"{_origin(now)} is there" if now is not None else "the module's own forward is back"
        if _origin(self.inner) != _origin(now):
            owner += f", and {_origin(self.inner)}, which it stood in front of, is gone"
        return LostGateError(
            f"the gate on {name or type(module).__name__} was replaced: {owner}. Apply skip plans after hooks and "
            f"offloading are set up, and remove them before those are removed."
        )


def install_all(gates: Sequence[Gate], inside: Gate | None = None) -> None:
    """Install every gate, or none: what was put in place before a failure is taken away again.

    Args:
        gates: outermost first.
        inside: the one that stands behind accelerate's hook.
    """
    done: list[Gate] = []
    try:
        for gate in gates:
            gate.install(inside=gate is inside)
            done.append(gate)
    except BaseException:
        for gate in reversed(done):
            gate.remove()
        raise


# Hooks of diffusers that stay in front of a gate, by the beginnings of their names: context parallelism splits what a
# block is given, caches answer in its place, and the two of group offloading that watch the first pass take themselves
# off in it.
_IN_FRONT = (
    *("cp_input", "cp_output", "layer_execution_tracker", "lazy_prefetch_group_offloading"),
    *("fbc_", "mag_cache_", "taylorseer_cache", "sea_cache_", "pyramid_attention_broadcast", "faster_cache_"),
)


def _behind_hooks(module: nn.Module) -> tuple[Any, str] | None:
    """Where a gate stands behind the hooks that have to stay in front of it: holder and attribute; None without any."""
    registry = module.__dict__.get("_diffusers_hook")
    if registry is None:
        return None
    for name, reference in zip(registry._hook_order, registry._fn_refs, strict=True):  # innermost first
        if name.startswith(_IN_FRONT):
            return reference, "forward" if reference.original_forward is None else "original_forward"
    return None


def _is_behind_offload(gate: Gate, module: nn.Module) -> bool:
    registry = module.__dict__.get("_diffusers_hook")
    if registry is None or (hook := registry.hooks.get("group_offloading")) is None:
        return False
    return hook.fn_ref.forward is gate


def _apply(act: Act, frame: Frame, call: Call, *args: Any, **kwargs: Any) -> Any:
    return act(frame, call, args, kwargs)


def _handle(handler: Handler, call: Call, *args: Any, **kwargs: Any) -> Any:
    return handler(call, args, kwargs)


def _origin(call: Any) -> str:
    """Where a callable comes from, in words: `accelerate.hooks.add_hook_to_module.<locals>.new_forward`."""
    target = call.func if isinstance(call, partial) else call
    return f"{getattr(target, '__module__', '?')}.{getattr(target, '__qualname__', type(target).__name__)}"


def _through_module(module: ref[nn.Module], *args: Any, **kwargs: Any) -> Any:
    alive: Any = module()
    return alive.forward(*args, **kwargs)


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
