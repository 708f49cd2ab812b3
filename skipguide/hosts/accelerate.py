"""The hooks of accelerate: where they keep the forward that they wrapped, and the weights that they load."""

from __future__ import annotations

from typing import Any

from torch import nn

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
