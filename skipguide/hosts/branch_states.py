"""Branch states: what a cache keeps of earlier steps, once for each branch, whatever the cache keeps it in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from torch import nn

from skipguide.hosts.cache_dit import CacheDitStates
from skipguide.hosts.diffusers_caches import KNOWN, hook_names, hooks_of
from skipguide.hosts.teacache import TeaCacheStates
from skipguide.hosts.wrappers import unwrap


class BranchStates(Protocol):
    """What a cache keeps for each branch of a step."""

    def branch(self, name: str) -> AbstractContextManager[None]:
        """The state of that branch is in force inside the block.

        Args:
            name: `"cond"`, `"uncond"`, `"both"` or `"only"` of the pipeline's own passes; `"skip"`, `"skip_1"`, …
        """
        ...

    def forget(self) -> None:
        """Forget the states of the branches; what the cache keeps by itself stays."""
        ...

    def reset(self) -> None:
        """Forget all of it: a run begins, or has failed."""
        ...


def states_of(model: nn.Module, cache: str | None) -> BranchStates:
    """The states of the cache on a model; without a known one those of whatever goes by the cache context."""
    apart = "contexts" if cache is None else KNOWN[cache].apart
    if apart == "manager":
        return CacheDitStates(model)
    if apart == "attributes":
        return TeaCacheStates(model)
    if apart == "hooks" and cache is not None:
        return HookStates(hooks_of(model, cache))
    return ContextStates(model, () if cache is None else _managers(model))


class ContextStates:
    """Hooks that keep a state per `cache_context`: the pipeline's passes have its contexts, skipped ones their own.

    A pipeline may say with its context which step this is, and at which noise level; that holds for the skipped pass
    too. A guider's pipeline may open none, so there every pass has one by its name.
    """

    def __init__(self, model: nn.Module, managers: Sequence[Any] = ()) -> None:
        self.model = model
        self.managers = tuple(managers)  # of the states of a known cache

    @contextmanager
    def branch(self, name: str) -> Iterator[None]:
        """A context of that name for a skipped pass, or a guider's; those that a pipeline has opened are left alone."""
        enter = getattr(self.model, "cache_context", None)
        if enter is None or not name.startswith(("skip", "pred_")):
            yield
            return
        before = [(manager, manager._context) for manager in self.managers]
        said: dict[str, Any] = next((vars(context) for _, context in before if context is not None), {})
        try:
            with enter(name, **{key: value for key, value in said.items() if key != "name"}):
                yield
        finally:
            for manager, context in before:
                manager.set_context(context)

    def forget(self) -> None:
        """Forget the states of skipped passes."""
        for manager in self.managers:
            for name in [name for name in manager._state_cache if name.startswith(("skip", "pred_"))]:
                del manager._state_cache[name]

    def reset(self) -> None:
        """Forget the states of all passes; the context in force stays."""
        for manager in self.managers:
            manager._state_cache.clear()


class HookStates:
    """Hooks that keep one state for all passes: it is exchanged around each of them.

    FasterCache makes up the unconditional rows of a batch. A skipped pass has none: there it does what it does for a
    model that needs no CFG.
    """

    def __init__(self, hooks: list[Any]) -> None:
        self.hooks = hooks
        self.kept: dict[str, list[Any]] = {}

    @contextmanager
    def branch(self, name: str) -> Iterator[None]:
        """The states of that branch are in force inside the block; one call for all rows has the hooks' own."""
        if name in ("both", "only"):
            yield
            return
        skips = name.startswith("skip")
        before = [dict(vars(hook)) for hook in self.hooks]
        states = self.kept.pop(name, None) or [_fresh(hook, skips) for hook in self.hooks]
        try:
            for hook, state in zip(self.hooks, states, strict=True):
                hook.state = state
                if skips and hasattr(hook, "is_guidance_distilled"):
                    hook.is_guidance_distilled = True
            yield
            self.kept[name] = states
        finally:
            for hook, old in zip(self.hooks, before, strict=True):
                for key in ("state", "is_guidance_distilled"):
                    if key in old:
                        setattr(hook, key, old[key])

    def forget(self) -> None:
        """Forget the states of the branches."""
        self.kept.clear()

    def reset(self) -> None:
        """Forget them, and the hooks' own."""
        self.forget()
        for hook in self.hooks:
            hook.state.reset()


def _fresh(hook: Any, skips: bool) -> Any:
    """A state as a hook has it at the beginning of a run."""
    state = type(hook.state)()
    alone = skips or getattr(hook, "is_guidance_distilled", False)
    if alone and hasattr(hook, "weight_callback"):  # FasterCache would answer the first pass of a window from nothing
        state.iteration = hook.block_skip_range
    return state


def _managers(model: nn.Module) -> list[Any]:
    """The managers of states by context, of the hooks of diffusers in a model."""
    found: dict[int, Any] = {}
    for module, name in hook_names(unwrap(model)):
        for value in vars(module.__dict__["_diffusers_hook"].hooks[name]).values():
            if type(value).__name__ == "StateManager":
                found[id(value)] = value
    return list(found.values())
