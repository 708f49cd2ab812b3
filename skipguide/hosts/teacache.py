"""TeaCache as its authors publish it: a forward in place of the model class's, and its state in attributes.

Facts from ali-vilab/TeaCache of 2025-06: the scripts set `enable_teacache` and the state's first values on the class,
and put their forward there; each call then writes the state on the instance. The scripts for LTX-Video, Flux, Mochi,
CogVideoX 1.5 and HunyuanVideo keep one state; those for Wan 2.1 and Cosmos keep two and tell them apart by counting
calls, and Lumina 2's tells them apart by the length of the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from skipguide.hosts.wrappers import unwrap

NAME = "TeaCache"
ENDING = "type({model}).forward = … with its own forward again, del type({model}).enable_teacache"
STATE: dict[str, Any] = {
    "cnt": 0,
    "accumulated_rel_l1_distance": 0,
    "previous_modulated_input": None,
    "previous_residual": None,
    "previous_residual_encoder": None,
}


def is_on(model: nn.Module) -> bool:
    """Whether a published forward of TeaCache is on this model and switched on."""
    return bool(getattr(unwrap(model), "enable_teacache", False))


def refusal(model: nn.Module, called: Any) -> str:
    """Why no skipped pass can have a state of its own with the forward that is there; empty if it can.

    Args:
        model: the denoiser.
        called: the forward that guidance calls.
    """
    model, code = unwrap(model), getattr(getattr(called, "__func__", None), "__code__", None)
    if code is not None and "enable_teacache" not in code.co_names:
        return "its forward was put there while guidance was on, which still calls the one before: apply again"
    if any(hasattr(model, name) for name in ("accumulated_rel_l1_distance_even", "previous_residual_even")):
        return "this forward of TeaCache takes every second call for the unconditional one, and skipped passes are more"
    if not all(hasattr(model, name) for name in ("cnt", "accumulated_rel_l1_distance", "previous_residual")):
        return "this forward of TeaCache keeps its state in attributes that nobody has described"
    return ""


class TeaCacheStates:
    """A state for each branch: the attributes that the forward keeps its state in are exchanged around each pass."""

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrap(model)
        self.first = {key: value for key, value in STATE.items() if hasattr(self.model, key)}  # of a run
        self.kept: dict[str, dict[str, Any]] = {}

    @contextmanager
    def branch(self, name: str) -> Iterator[None]:
        """The state of that branch is in force inside the block."""
        attributes = self.model.__dict__
        before = {key: attributes.pop(key) for key in self.first if key in attributes}
        attributes.update(self.kept.pop(name, self.first))
        try:
            yield
            self.kept[name] = {key: attributes[key] for key in self.first if key in attributes}
        finally:
            for key in self.first:
                attributes.pop(key, None)
            attributes.update(before)

    def forget(self) -> None:
        """Forget the states of the branches."""
        self.kept.clear()

    def reset(self) -> None:
        """Forget every state, the model's own too."""
        self.forget()
        for key, value in self.first.items():
            self.model.__dict__.pop(key, None)
            if not hasattr(self.model, key):
                self.model.__dict__[key] = value
