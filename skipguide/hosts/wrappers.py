"""Wrappers of whole models: torch.compile, data parallel, PEFT. What is inside them is what a plan is about."""

from __future__ import annotations

from typing import cast

from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, data-parallel and PEFT wrappers."""
    while True:
        if isinstance(inner := model.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            model = inner
        elif type(model).__name__ in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
            model = cast(nn.Module, model.module)
        elif callable(base := getattr(model, "get_base_model", None)) and isinstance(inner := base(), nn.Module):
            if inner is model:
                return model
            model = inner
        else:
            return model
