"""Gate: the stand-in at one module's `forward`. At each call it does what the active plans say.

There is one gate per module, shared by all plans that need it: it goes when the last `Installation` that wants it is
removed. Ctrl-C can come between any two lines: what was broken off halfway is undone by removing again, or mended by
the next installation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary, ref

import torch
from torch import nn

from skipguide.active import ACTIVE, ActivePlan, Call, Intervention
from skipguide.errors import LostGateError, SkipError
from skipguide.hosts import accelerate, cache_dit, diffusers_hooks
from skipguide.hosts.compiled import NEEDS_TORCH, TRACES_PLANS
from skipguide.hosts.copies import copied_without

IDLE, HALFWAY, STANDING = "idle", "halfway", "standing"


class Gate:
    """Stands in for one module's `forward` (or for its compiled call, which is faster to skip from outside).

    Attributes:
        key: by which plans name it.
        everywhere: the plans that hold here in all threads, innermost first; `active.hold_everywhere` changes it.
        inner: the forward behind it.
        users: the installations that want it. They are not kept alive: one that was dropped wants nothing any more.
        passed_by: calls in threads and tasks where no plan holds.
        slot: the attribute of the module that it has taken.
        place: whether it stands on the module: `IDLE`, `STANDING`, or `HALFWAY` between the two.
    """

    # no __dict__: functools.update_wrapper, with which others wrap a gate, would copy it
    __slots__ = ("__weakref__", "_module", "_own", "everywhere", "inner", "key", "passed_by", "place", "slot", "users")

    def __init__(self, module: nn.Module) -> None:
        self._module = ref(module)
        self.key = id(module)
        self.users: WeakSet[Installation] = WeakSet()
        self.place = IDLE
        self.passed_by = 0
        self.slot = "forward"
        self.inner: Call = partial(_through_module, self._module)
        self._own = False  # whether the slot held something on the instance before
        self.everywhere: tuple[ActivePlan, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module as the active plans say; without any, just run it."""
        if not self.everywhere:
            return self._here(*args, **kwargs)
        call: Call = self._here
        for plan in self.everywhere:
            call = partial(_intervene, plan.interventions[self.key], plan, call)
        return call(*args, **kwargs)

    def _here(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module as the plans of this thread or task say, those that were entered just now too."""
        plans = ACTIVE.get()
        if not plans:
            if not torch.compiler.is_compiling():
                self.passed_by += 1
            return self.inner(*args, **kwargs)
        call: Call = partial(self._run, plans)
        if len(plans) == 1 and (plan := plans[0]).live:  # what every step of a decoding model goes through
            if not torch.compiler.is_compiling():
                if not plan.batch:
                    plan.note_outside(self)
                if self.key in plan.seen:
                    plan.repeated.add(self.key)
                plan.seen.add(self.key)
                if plan.follow is not None:
                    plan.follow(plans)
            only = plan.interventions.get(self.key)
            return call(*args, **kwargs) if only is None else only(plan, call, args, kwargs)
        for plan in plans:
            if not plan.live:
                continue
            if not torch.compiler.is_compiling():
                if not plan.batch:
                    plan.note_outside(self)
                if self.key in plan.seen:
                    plan.repeated.add(self.key)
                plan.seen.add(self.key)
                if plan.follow is not None:
                    plan.follow(plans)
            found = plan.interventions.get(self.key)
            if found is not None:
                call = partial(_intervene, found, plan, call)
        return call(*args, **kwargs)

    def _run(self, plans: tuple[ActivePlan, ...], *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            for plan in plans:
                name = plan.names.get(self.key)
                if name is not None and plan.live:
                    plan.stats.ran(name, plan.present)
                    if plan.groups is not None:
                        plan.groups.runs(self.module)
        return self.inner(*args, **kwargs)

    @property
    def __wrapped__(self) -> Call:
        """The forward behind the gate, so that `inspect.signature(module.forward)` stays true."""
        return self.inner

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model is free of gates, and of the attribute that this one is."""
        if self._own or self.slot != "forward":
            return copy.deepcopy(self.inner, memo)
        return copied_without(self._module(), "forward", self.inner, memo)

    def __reduce__(self) -> Any:
        """Pickling a model with an active plan would store the plan's machinery with it."""
        raise SkipError("this model has an active plan; leave the `with` block or call remove() before pickling it")

    # -- installation -------------------------------------------------------------------------------------------

    def install(self, user: Installation, inside: bool = False) -> None:
        """Stand in for the module; for the second user of the same gate, it stands there already.

        A hook of diffusers that changes what the module is given or gives, or that takes itself off in a run, stays
        in front of the gate; one that loads weights stays behind it, so that nothing is loaded for a skipped module.

        Args:
            user: who wants it.
            inside: stand behind accelerate's hook, not in front of it, where there is one. Pipelines with model
                offload take that hook off and put it on again after every run.
        """
        with _LOCK:
            if self.place != STANDING:
                self.users.add(user)  # first, so that removing undoes whatever comes next
                self._stand(inside)
            elif not self.reachable():
                if self.users:
                    raise self.lost()
                self._stand()  # nobody who is left has lost it
            self.users.add(user)

    def _stand(self, inside: bool = False) -> None:
        """Take the module's slot."""
        self._stand_back()  # from wherever an interrupt has left it
        holder: Any = self.module
        module, self.slot = self.module, "forward"
        if (behind := diffusers_hooks.place_behind(module)) is not None:
            holder, name = behind
        elif module.__dict__.get("_compiled_call_impl") is not None:
            name = self.slot = "_compiled_call_impl"
        else:
            name = self.slot = accelerate.slot(module, inside)
        self.place = HALFWAY
        self._own = name in holder.__dict__
        self.inner = getattr(holder, name)
        holder.__dict__[name] = self
        _INSTALLED[self.key] = self
        _IDLE.pop(module, None)
        self.place = STANDING

    def move_in_front(self) -> None:
        """Move in front of what came while the gate stood.

        Inside a compiled call every block's gate would be another constant, and every block another graph. Behind
        group offloading blocks would be loaded to be skipped, and a cache's hook on the model would see one pass only.
        """
        module = self.module
        attributes = module.__dict__
        compiled = attributes.get("_compiled_call_impl") is not None and attributes.get("forward") is self
        interrupted = self.place != STANDING and bool(self.users)
        behind = diffusers_hooks.is_behind(self, module) or cache_dit.is_behind(self, module)
        if compiled or interrupted or behind:
            with _LOCK:
                self._stand_back()
                self._stand()

    def remove(self, user: Installation) -> None:
        """One user less, if it was one; the last one puts back what was there.

        Where another library wrapped the gate, its wrapper gets what is behind the gate.
        """
        with _LOCK:
            self.users.discard(user)
            if not self.users:
                self._stand_back()

    def _stand_back(self) -> None:
        """Give the slot back, from wherever it was; nothing happens where the gate does not stand."""
        module = self._module()
        if self.place == IDLE or module is None:
            return
        if holders := self._holders(module):
            self.place = HALFWAY
        for holder, name in holders:
            if holder is module and name == "forward" and not self._own:
                del module.__dict__[name]
            else:
                setattr(holder, name, self.inner)
        if self.place == HALFWAY:
            if (wrapper := self._wrapper(module)) is not None:
                wrapper.__wrapped__ = self.inner
            # a call that is on its way through this gate in another thread still finds the module
            self.inner = partial(_through_module, self._module)
            _IDLE[module] = self
        # otherwise an unknown wrapper may still call this gate: it stays with them, and only passes calls on
        _INSTALLED.pop(self.key, None)
        self.place = IDLE

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
        """Whether calls still reach it: it is where it was installed, or behind wrappers that show what they wrap."""
        module = self.module
        return bool(self._holders(module)) or self._wrapper(module) is not None

    def _holders(self, module: nn.Module) -> list[tuple[Any, str]]:
        """Where this gate is: on the module, or where accelerate and diffusers keep the forward they wrapped."""
        places: list[tuple[Any, str]] = [(module, self.slot), (module, "forward"), (module, accelerate.KEPT_FORWARD)]
        places += [*diffusers_hooks.places(module), *cache_dit.places(module)]
        each = {(id(holder), name): (holder, name) for holder, name in places}
        return [(holder, name) for holder, name in each.values() if getattr(holder, name, None) is self]

    def _wrapper(self, module: nn.Module) -> Any:
        """The wrapper around this gate, found through `__wrapped__` (functools.wraps) from the module's forward on."""
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
            f"the gate on {name or type(module).__name__} was replaced: {owner}. Apply skip plans after hooks, "
            f"caches and offloading are set up, and remove them before those are removed."
        )


if not TRACES_PLANS:  # a break of the graph that says why, instead of dynamo's own error at the ContextVar
    uncompiled: Any = torch.compiler.disable
    setattr(Gate, "__call__", uncompiled(Gate.__call__, reason=NEEDS_TORCH))  # noqa: B010


class Installation:
    """One user's gates. Installing puts up every one of them or none; removing takes away this user's claim alone.

    Both can be repeated: a second installation, a removal before the first one or after the last change nothing.

    Args:
        gates: outermost first.
        inside: the one that stands behind accelerate's hook.
    """

    __slots__ = ("__weakref__", "gates", "inside")

    def __init__(self, gates: Iterable[Gate] = (), inside: Gate | None = None) -> None:
        self.gates = list(gates)
        self.inside = inside

    def install(self) -> None:
        """Put the gates in place; after a failure none that was not there before."""
        before = [self in gate.users for gate in self.gates]
        try:
            for gate in self.gates:
                gate.install(self, inside=gate is self.inside)
        except BaseException:
            for gate, there in zip(reversed(self.gates), reversed(before), strict=True):
                if not there:
                    gate.remove(self)
            raise

    def add(self, gate: Gate) -> None:
        """Put one more gate in place."""
        if gate not in self.gates:
            self.gates.append(gate)
        gate.install(self, inside=gate is self.inside)

    def remove(self) -> None:
        """Give the gates up; those that nobody else wants go."""
        for gate in reversed(self.gates):
            gate.remove(self)


def _intervene(intervention: Intervention, plan: ActivePlan, call: Call, *args: Any, **kwargs: Any) -> Any:
    return intervention(plan, call, args, kwargs)


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


def installed_gates(modules: Iterable[nn.Module]) -> list[Gate]:
    """The gates that stand on some modules."""
    with _LOCK:
        found = [_INSTALLED.get(id(module)) for module in modules]
    return [gate for gate in found if gate is not None and gate._module() is not None]


def gates_at(keys: Iterable[int]) -> list[Gate]:
    """The gates that stand, by which plans name them."""
    with _LOCK:
        return [gate for key in keys if (gate := _INSTALLED.get(key)) is not None]
