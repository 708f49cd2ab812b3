"""Copies: what `copy.deepcopy` makes of an attribute that stands on a module for a while."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


class _Leftover:
    """Takes an attribute off a copied module as soon as the copying is over.

    A copy gets every attribute of its original under the same name, and nobody is asked afterwards. What the memo of
    the copying holds, though, is let go of at its end: then this goes, and the attribute with it.
    """

    def __init__(self, module: nn.Module, name: str, value: Any) -> None:
        self.module, self.name, self.value = module, name, value

    def __del__(self) -> None:
        if self.module.__dict__.get(self.name) is self.value:
            del self.module.__dict__[self.name]


def copied_without(original: nn.Module | None, name: str, value: Any, memo: dict[int, Any]) -> Any:
    """A copy of what an attribute stands in for, which the copied module does not keep.

    Args:
        original: the module that is being copied.
        name: of the attribute, which the module itself does not have.
        value: what the attribute stands in for, such as the forward of the module's class.
        memo: of the copying.
    """
    made = copy.deepcopy(value, memo)
    if isinstance(twin := memo.get(id(original)), nn.Module):
        leftover = _Leftover(twin, name, made)
        memo[id(leftover)] = leftover
    return made
