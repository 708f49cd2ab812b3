"""Sequential: blocks of one `nn.Sequential`, where only the next block sees what a block returns.

A router that computed some rows has to put them among the others. In general it copies the whole batch for that, since
its input may be read again. In a Sequential it writes the rows into the batch that it made one block before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from skipguide.active import ActivePlan, Call, active_plans
from skipguide.gate import Gate


class InPlaceSequential:
    """The intervention at a Sequential of blocks: knows which tensor is the router's own while the Sequential runs.

    Attributes:
        own: what the router made for the block before, and may overwrite.
    """

    __slots__ = ("gates", "own", "runs")

    def __init__(self, gates: tuple[Gate, ...]) -> None:
        self.gates = gates
        self.own: Tensor | None = None
        self.runs = False

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the Sequential."""
        self.runs = self._is_private()
        try:
            return call(*args, **kwargs)
        finally:
            self.runs = False
            self.own = None  # what leaves the Sequential is the caller's

    def take(self, x: Tensor) -> bool:
        """Whether x is the router's own. From now on it is not: what runs on all of x may keep it or return it."""
        own, self.own = self.own, None
        return own is x

    def keep(self, out: Tensor) -> Tensor:
        """Note what the router made for the next block."""
        if self.runs:
            self.own = out
        return out

    def _is_private(self) -> bool:
        """Whether nothing else sees a tensor between the blocks: no autograd, hook, mode, wrapper or other plan."""
        return (
            not torch.is_grad_enabled()
            and len(active_plans()) == 1
            and not torch._C._len_torch_function_stack()
            and not hooks._global_forward_hooks
            and not hooks._global_forward_pre_hooks
            and all(gate.outermost for gate in self.gates)
        )


def find_sequentials(model: nn.Module, blocks: Iterable[nn.Module]) -> dict[nn.Module, tuple[nn.Module, ...]]:
    """The Sequentials of a model that end in two or more of the blocks, one after the other, and those blocks.

    Example:
        >>> stem, a, b = (nn.Linear(2, 2) for _ in range(3))
        >>> model = nn.Sequential(nn.Sequential(stem, a, b), nn.ReLU())
        >>> [len(found) for found in find_sequentials(model, [a, b]).values()]
        [2]
    """
    routed = {id(block) for block in blocks}
    found: dict[nn.Module, tuple[nn.Module, ...]] = {}
    for module in model.modules():
        if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
            continue
        children = list(module)
        while children and id(children[0]) not in routed:
            del children[0]
        if len({id(child) for child in children} & routed) == len(children) >= 2:
            found[module] = tuple(children)
    return found
