"""cache-dit: how it marks what it caches, which blocks it always runs, and a state of its own for each branch.

Facts from cache-dit 1.5.3: each list of blocks of a model has a context with counters and buffers, which the pipeline's
call makes anew; a manager finds it by the list's name in a dictionary. DBCache runs the first `Fn` and the last `Bn`
blocks in every pass and decides by what the first ones add; DBPrune decides block by block.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from skipguide.hosts.wrappers import unwrap

NAME = "cache-dit"
TESTED = ("1.5", "1.6")  # from this version, below that one


def is_cached(target: Any) -> bool:
    """Whether cache-dit caches this pipeline or model.

    It marks models one by one, but of a pipeline the class. What it keeps of one pipeline is on that pipeline, so that
    another of the same class is not taken for cached.
    """
    own = (
        [vars(unwrap(target)), target.__dict__] if isinstance(target, nn.Module) else [getattr(target, "__dict__", {})]
    )
    if any(each.get("_is_cached") for each in own):
        return True
    return bool(getattr(type(target), "_is_cached", False)) and any("_context_manager" in each for each in own)


def refusal(model: nn.Module, constant: bool, standing: object) -> str:
    """Why cache-dit on this model does not go together with skipped passes; empty if it does.

    Args:
        model: the denoiser.
        constant: whether a skipped pass runs at every step.
        standing: the gate at the model.
    """
    model = unwrap(model)
    manager = vars(model).get("_context_manager")
    if not all(hasattr(manager, name) for name in ("_cached_context_manager", "_current_context")):
        return "its contexts are not where version 1.5 keeps them, so a skipped pass cannot have one of its own"
    if vars(model).get("_original_forward") is standing:
        return "it was enabled behind the guidance and would call it from inside: enable it first, then apply"
    masks = [config.steps_computation_mask for config in _configs(model)]
    if not constant and any(mask is not None for mask in masks):
        return "its steps_computation_mask counts passes as steps: use every=1 and no window"
    return ""


def places(module: nn.Module) -> list[tuple[Any, str]]:
    """Where cache-dit keeps the forward that it wrapped: an attribute of the model, and a variable of its own forward.

    Returns:
        Holders and attributes; none for a model that it does not cache.
    """
    if "_original_forward" not in vars(module):
        return []
    found: list[tuple[Any, str]] = [(module, "_original_forward")]
    functions, seen = [vars(module).get("forward")], set()
    while functions:
        function = functions.pop()
        function = getattr(function, "func", function)  # a partial of its function
        code = getattr(function, "__code__", None)
        if code is None or id(function) in seen or not function.__module__.startswith("cache_dit."):
            continue
        seen.add(id(function))
        for name, cell in zip(code.co_freevars, getattr(function, "__closure__", None) or (), strict=True):
            if name == "original_forward":
                found.append((cell, "cell_contents"))
            elif name == "new_forward":
                functions.append(cell.cell_contents)
    return found


def is_behind(gate: object, module: nn.Module) -> bool:
    """Whether cache-dit was enabled behind a gate, which it calls from inside, and keeps it where 1.5 does."""
    return any(getattr(holder, name) is gate for holder, name in places(module) if holder is not module)


def _configs(model: nn.Module) -> list[Any]:
    """The settings of its contexts; those of the call, where one is running."""
    names, manager = vars(model).get("_context_names", ()), vars(model)["_context_manager"]
    found = [manager._cached_context_manager[name] for name in names if name in manager._cached_context_manager]
    if found:
        return [context.cache_config for context in found]
    kept = (vars(model).get("_context_kwargs") or {}).get("cache_config")
    return [] if kept is None else [kept]


def zones(model: nn.Module, blocks: Sequence[str]) -> tuple[int, int, bool]:
    """How many of the first and of the last blocks run in every pass, and whether no pass can start in the middle.

    Args:
        model: the denoiser.
        blocks: names of its blocks.
    """
    model = unwrap(model)
    configs = _configs(model)
    lists = {name.rpartition(".")[0] for name in blocks}
    if len(configs) != 1 or len(lists) != 1 or "Prune" in str(configs[0].cache_type):
        return 0, 0, True
    return configs[0].Fn_compute_blocks, configs[0].Bn_compute_blocks, False


class CacheDitStates:
    """Contexts for each branch. The pipeline's own passes keep those that cache-dit has for them.

    It tells an unconditional call from a conditional one where it was told to (`enable_separate_cfg`); elsewhere it
    would answer one from the other, so there the unconditional call has contexts of its own too.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrap(model)
        self.kept: dict[str, dict[str, Any]] = {}
        self.of: dict[str, Any] = {}  # the pipeline's contexts that they were made for: a new call has new ones

    @contextmanager
    def branch(self, name: str) -> Iterator[None]:
        """The contexts of that branch are in force inside the block; the others leave cache-dit's alone."""
        manager = vars(self.model)["_context_manager"]
        plain, current = manager._cached_context_manager, manager._current_context
        separate = any(context.cache_config.enable_separate_cfg for context in plain.values())
        if not (name.startswith("skip") or (name.endswith("uncond") and not separate)):
            yield
            return
        if any(self.of.get(key) is not context for key, context in plain.items()):
            self.kept, self.of = {}, dict(plain)
        if name not in self.kept:
            self.kept[name] = {key: _fresh(context) for key, context in plain.items()}
        manager._cached_context_manager = self.kept[name]
        try:
            yield
        finally:
            manager._cached_context_manager, manager._current_context = plain, current

    def forget(self) -> None:
        """Forget the contexts of the branches."""
        self.kept, self.of = {}, {}

    def reset(self) -> None:
        """Forget them, and begin those of the model anew where no pipeline's call does it."""
        self.forget()
        manager: Any = vars(self.model).get("_context_manager")
        if getattr(manager, "persistent_context", False):
            for context in list(manager._cached_context_manager.values()):
                manager.reset_context(context.name, *context._init_args, **context._init_kwargs)


def _fresh(context: Any) -> Any:
    """A context as one was at its beginning, for a branch that is called once per step."""
    given = {key: copy.deepcopy(value) for key, value in context._init_kwargs.items()}
    given["cache_config"].enable_separate_cfg = False
    made = type(context)(*context._init_args, **given)
    made._init_args, made._init_kwargs = context._init_args, given
    return made
