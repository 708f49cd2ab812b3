"""The hooks of accelerate: where they keep the forward that they wrapped."""

from __future__ import annotations

from torch import nn

KEPT_FORWARD = "_old_forward"


def slot(module: nn.Module, inside: bool) -> str:
    """The attribute of a module that a gate takes.

    Args:
        module: with accelerate's hook or without.
        inside: stand behind the hook. Pipelines with model offload take it off and put it on again after every run.
    """
    return KEPT_FORWARD if inside and KEPT_FORWARD in module.__dict__ else "forward"
