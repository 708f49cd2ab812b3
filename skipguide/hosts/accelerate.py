"""The hooks of accelerate: where they keep the forward that they wrapped, and where they bring offloaded weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from skipguide.errors import SkipError

KEPT_FORWARD = "_old_forward"


def slot(module: nn.Module, inside: bool) -> str:
    """The attribute of a module that a gate takes.

    Args:
        module: with accelerate's hook or without.
        inside: stand behind the hook. Pipelines with model offload take it off and put it on again after every run.
    """
    return KEPT_FORWARD if inside and KEPT_FORWARD in module.__dict__ else "forward"


def execution_device(model: nn.Module) -> torch.device:
    """Where a model runs, and wants its inputs.

    Offloaded weights are on the device "meta" between two passes; the hook that loads them knows where to.

    Raises:
        SkipError: for a model without weights.
    """
    devices = [parameter.device for parameter in model.parameters()]
    if not devices or devices[0].type != "meta":
        return devices[0] if devices else torch.device("cpu")
    for module in model.modules():
        if (found := _brought_to(module.__dict__.get("_hf_hook"))) is not None:
            return torch.device(found)
    raise SkipError(
        f"the weights of {type(model).__name__} are on the meta device, and no hook of accelerate loads them: load the "
        f"model with its weights"
    )


def _brought_to(hook: Any) -> Any:
    """The device of a hook, or of the first in a sequence of them that has one."""
    found = [getattr(each, "execution_device", None) for each in (hook, *getattr(hook, "hooks", ()))]
    return next((device for device in found if device is not None), None)
