"""The compiled graphs of torch: whether the blocks of a model run inside one, where no Python sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

from skipguide.hosts.wrappers import unwrap

_COMPILED = "_torchdynamo_orig_callable"  # is on every function that torch.compile returns


@cache
def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that no graph is made of when a compiled model calls it; what it calls may be compiled by itself."""
    # imports dynamo, as diffusers has done by then
    outside: Callable[..., Any] = torch.compiler.disable(function)  # type: ignore[no-untyped-call, unused-ignore]
    return outside


def holds_blocks(model: nn.Module, blocks: Iterable[str]) -> bool:
    """Whether blocks of a model run inside a compiled graph, so that nobody can count them.

    A block that is compiled by itself is seen, as long as what stands outermost at it is not the compiled call.

    Args:
        model: with the wrappers that are around it.
        blocks: names of its blocks in the model inside the wrappers.
    """
    bare = unwrap(model)
    if any("_orig_mod" in module._modules for module in _wrappers(model, bare)):
        return True
    names = set(blocks)
    parents = {name[:end] for name in names for end, letter in enumerate(name) if letter == "."} | {""}
    for name in parents:
        parent = bare.get_submodule(name)
        if "_orig_mod" in parent._modules or any(hasattr(call, _COMPILED) for call in _chain(parent)):
            return True
    return any(hasattr(call, _COMPILED) for name in names for call in _outermost(bare.get_submodule(name)))


def _wrappers(model: nn.Module, bare: nn.Module) -> Iterator[nn.Module]:
    """The modules around the model, outermost first."""
    for module in model.modules():
        if module is bare:
            return
        yield module


def _outermost(module: nn.Module) -> tuple[Any, ...]:
    """What a call of a module meets first: its compiled call, or its forward."""
    compiled = module.__dict__.get("_compiled_call_impl")
    return (module.forward,) if compiled is None else (compiled,)


def _chain(module: nn.Module) -> Iterator[Any]:
    """Everything that a call of a module goes through, as far as each says what it wraps."""
    for call in (module.__dict__.get("_compiled_call_impl"), module.forward):
        while call is not None:
            yield call
            call = getattr(call, "__wrapped__", None)
