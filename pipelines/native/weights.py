"""Weights: everything but the inputs that a pass depends on up to a block, as it is at one moment."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from skipguide.blocks import BlockMap
from skipguide.hosts.accelerate import offloaded_weight
from skipguide.hosts.diffusers_hooks import moves_weights, only_moves

# what PEFT keeps on a layer: which adapters are on, how strongly, and which were added into the weights
_ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")


@dataclass(frozen=True)
class WeightState:
    """The modules, tensors and processors in force, and what else can be compared by value.

    Attributes:
        held: the objects; they are kept, so that no other one gets the identity of one that is gone.
        values: the versions of the tensors, the adapters with their scales, the names of hooks.
        places: where the tensors' memory is; empty for a model that is loaded bit by bit, whose memory moves by itself.
        known: False where a tensor has no version (made in inference mode), so that a change would not be seen.
        watched: whether somebody has hooks of torch, or unknown ones of diffusers, on blocks that would not run again:
            they may do something else in every pass.
    """

    held: tuple[Any, ...]
    values: tuple[Any, ...]
    places: tuple[int, ...]
    known: bool
    watched: bool

    def same(self, other: WeightState) -> bool:
        """Whether nothing changed in between."""
        return (
            self.known
            and other.known
            and len(self.held) == len(other.held)
            and all(map(operator.is_, self.held, other.held))
            and self.values == other.values
            and self.places == other.places
        )


def weight_state(blocks: BlockMap, stop: int) -> WeightState:
    """The state of all of a model but its blocks from `stop` on.

    Args:
        blocks: of the model.
        stop: the first block that is not looked at.
    """
    later = {id(block.module) for block in blocks.blocks[stop:]}
    held: list[Any] = []
    values: list[Any] = [_surroundings()]
    places: list[int] = []
    known, moves, watched = True, False, False
    inside = {id(module) for block in blocks.blocks[:stop] for module in block.module.modules()}
    for module in _modules(blocks.model, later):
        own = module.__dict__
        held.append(module)
        if (processor := own.get("processor")) is not None:
            held.append(processor)
        for table in (own["_parameters"], own["_buffers"]):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                source: Any = offloaded_weight(module, name) if tensor.is_meta else tensor
                held.append(source)
                if not isinstance(source, Tensor):
                    continue
                if source.is_inference():
                    known = False
                    continue
                values.append(source._version)
                places.append(address(source))
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            watched = watched or id(module) in inside
            values.append((tuple(own["_forward_hooks"]), tuple(own["_forward_pre_hooks"])))
        if (registry := own.get("_diffusers_hook")) is not None and registry._hook_order:
            values.append(tuple(registry._hook_order))
            moves = moves or moves_weights(registry._hook_order)
            watched = watched or (id(module) in inside and not only_moves(registry._hook_order))
        if "scaling" in own:
            values.append(tuple(_copied(own.get(name)) for name in _ADAPTERS))
    return WeightState(tuple(held), tuple(values), () if moves else tuple(places), known, watched)


def address(tensor: Tensor) -> int:
    """Where a tensor's memory is; 0 for one that has none of its own (quantised weights made of several)."""
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _surroundings() -> tuple[Any, ...]:
    """The settings of torch that change what operations give."""
    kinds = ("cpu", "cuda")
    return tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)


def _modules(module: nn.Module, later: set[int]) -> Iterator[nn.Module]:
    yield module
    for child in module._modules.values():
        if child is not None and id(child) not in later:
            yield from _modules(child, later)


def _copied(value: Any) -> Any:
    """A list or mapping as it is now."""
    if isinstance(value, dict):
        return tuple(value.items())
    return tuple(value) if isinstance(value, (list, tuple, set)) else value
