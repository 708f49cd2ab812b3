"""The hooks of accelerate: the forward that they wrapped, the weights that they load, and where to."""

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


def offloaded_weight(module: nn.Module, name: str) -> Any:
    """What stands for a weight that is only on its device while its module runs: the tensor that it is loaded from.

    Args:
        module: that the weight belongs to.
        name: of the weight in the module.

    Returns:
        That tensor; the map that reads it from a disk, where there is none in memory; None without accelerate's hook.
    """
    hook = module.__dict__.get("_hf_hook")
    for each in (hook, *getattr(hook, "hooks", ())):
        weights = getattr(each, "weights_map", None)
        if weights is None:
            continue
        table, prefix = getattr(weights, "dataset", weights), getattr(weights, "prefix", "")
        return table.get(f"{prefix}{name}") if isinstance(table, dict) else table
    return None


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
