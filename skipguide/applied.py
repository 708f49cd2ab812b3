"""Applied: the handles on what holds on a model or a pipeline, for whoever has lost them."""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any, Protocol

from torch import nn

from skipguide.active import Intervention, active_plans
from skipguide.errors import SkipError
from skipguide.gate import Gate, Installation, installed_gates


class Handle(Protocol):
    """What `apply` returns, or a `Skipper` inside its `with` block."""

    def remove(self) -> None:
        """End it."""


class MethodHandle:
    """A handle whose method stands in for one of the model's own, as an attribute of the model: it is found there."""

    def remove(self) -> None:
        """End it."""
        raise NotImplementedError


def applied_to(target: Any) -> list[Handle]:
    """The handles on what is applied to a model or pipeline: guidance, masks, sublayer plans, and Skippers.

    In a notebook the handle of a cell that was run before is often gone. It is found by what it put on the model:
    no list is kept of it, and what was removed is not found.

    Args:
        target: a model, or a pipeline: all of its models are looked through.

    Returns:
        What is applied in all threads and what was entered in this one, each once, the earliest first.

    Raises:
        SkipError: for something that is neither.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from skipguide.llm import SublayerPlan
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...     num_hidden_layers=2, num_attention_heads=2))
        >>> _ = SublayerPlan(mlp=[1]).apply(model)
        >>> [handle.plan.mlp for handle in applied_to(model)]
        [(1,)]
        >>> _ = remove_from(model)
        >>> applied_to(model)
        []
    """
    models, gates = _targets(target), _gates(target)
    keys = {gate.key for gate in gates}
    here = [plan for plan in active_plans() if plan.root is not None and plan.root.key in keys]
    standing = [(gate.key, plan) for gate in gates for plan in gate.everywhere]
    standing += [(plan.root.key, plan) for plan in here if plan.root is not None]
    found: dict[int, Handle] = {}
    for key, plan in standing:
        handle = _handle(plan.interventions.get(key))
        if handle is not None and (target in models or _is_on(handle, target)):
            found[id(handle)] = handle
    methods = [value for model in models for value in model.__dict__.values() if isinstance(value, MethodType)]
    found |= {id(owner): owner for method in methods if isinstance(owner := method.__self__, MethodHandle)}
    return list(found.values())


def _is_on(handle: Handle, pipe: Any) -> bool:
    """Whether a handle is of that pipeline, or of one inside it: two pipelines may share a model."""
    own = getattr(handle, "pipe", pipe)
    return own is pipe or any(own is part for part in vars(pipe).values())


def remove_from(target: Any) -> list[Handle]:
    """Remove all that `applied_to` finds, the latest first; gives what was removed.

    Args:
        target: a model or a pipeline.

    Raises:
        SkipError: for something that is neither.

    Example:
        >>> from diffusers import LTXVideoTransformer3DModel
        >>> from skipguide import Skipper, SkipPlan
        >>> model = LTXVideoTransformer3DModel(in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2,
        ...     attention_head_dim=8, cross_attention_dim=16, caption_channels=8)
        >>> with Skipper(model, SkipPlan([1])) as skipper:
        ...     remove_from(model) == [skipper], applied_to(model)
        (True, [])
    """
    handles = applied_to(target)
    for handle in reversed(handles):
        handle.remove()
    for gate in _gates(target):
        gate.remove(Installation())  # one that nobody wants any more goes: Ctrl-C left it, and the handle is gone
    return handles


def _handle(intervention: Intervention | None) -> Handle | None:
    """The handle that an intervention belongs to; None for those of a driver that has none."""
    found: Handle | None = getattr(intervention, "handle", None)
    return found


def _targets(target: Any) -> list[nn.Module]:
    """A model, or the models of a pipeline."""
    return [target] if isinstance(target, nn.Module) else list(_models(target))


def _gates(target: Any) -> list[Gate]:
    return installed_gates(module for model in _targets(target) for module in model.modules())


def _models(pipe: Any) -> Iterator[nn.Module]:
    """The models of a pipeline."""
    components = getattr(pipe, "components", None)
    parts = list((components if isinstance(components, dict) else getattr(pipe, "__dict__", {})).values())
    found = [part for part in parts if isinstance(part, nn.Module)]
    if not found:
        raise SkipError(f"expected a model, or a pipeline with models; got {type(pipe).__name__}")
    yield from found
