"""Skipper pass: what happens at the model itself under a Skipper. The pass is counted, and a lost gate is noticed."""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from torch import nn

from skipguide.active import ActivePlan
from skipguide.arguments import Arguments, batch_size
from skipguide.errors import LostGateError, SkipError
from skipguide.gate import gate_of
from skipguide.hosts.group_offload import SharedGroups
from skipguide.model_pass import ModelPass
from skipguide.perturbations.grid import GridReader
from skipguide.prefix import WRITTEN


class SkipperPass(ModelPass):
    """A pass under a Skipper: it is counted, and a gate that was lost is noticed afterwards.

    Attributes:
        lists: the lists of blocks by name -> how many modules are in each.
        blocks: the gates of blocks at which something happens -> name.
        grid: reads where the tokens lie, for plans that go by that.
        consumed: the model's arguments that it empties, which `arguments` reads.
        steady: whether the driver moves the gates in front itself, once per call of its pipeline, and not every pass.
    """

    __slots__ = ("arguments", "blocks", "consumed", "gates", "grid", "lists", "model", "modules", "skipper", "steady")

    def __init__(self, skipper: Any, model: nn.Module, modules: dict[str, nn.Module]) -> None:
        self.skipper = ref(skipper)
        self.model = model
        self.modules = modules
        self.gates = {name: gate_of(module) for name, module in modules.items()}
        self.lists: dict[str, int] = {}
        self.blocks: dict[int, str] = {}
        self.grid: GridReader | None = None
        self.steady = False
        self.consumed = skipper.map.spec.consumed
        self.arguments = Arguments(model)

    @property
    def handle(self) -> Any:
        """The Skipper, while it lives."""
        return self.skipper()

    def open(self, plan: ActivePlan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count the pass, put the gates in front and find groups that are loaded together."""
        plan.batch = batch_size(args, kwargs)
        if self.grid is not None:
            plan.grid = self.grid.read(args, kwargs)
        if self.consumed:
            plan.holds[WRITTEN] = any(self.arguments.get(name, args, kwargs) is not None for name in self.consumed)
        if torch.compiler.is_compiling():
            return
        plan.stats.passes += 1
        if not self.steady:
            self.move_in_front()
        plan.groups = SharedGroups.among(self.modules.values())

    def own(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """With own copies of the lists that the model empties."""
        return self.arguments.own(self.consumed, args, kwargs) if self.consumed else (args, kwargs)

    def move_in_front(self) -> None:
        """Put every gate in front of what came while it stood."""
        for gate in self.gates.values():
            gate.move_in_front()

    def end(self, plan: ActivePlan) -> None:
        """Release the groups that are still loaded."""
        if plan.groups is not None:
            plan.groups.release()
            plan.groups = None

    def close(self, plan: ActivePlan, out: Any) -> None:
        """Notice that a module was exchanged, or that its gate was lost: the skip did not happen."""
        for name, count in self.lists.items():
            if (length := len(self.model.get_submodule(name)._modules)) != count:
                raise LostGateError(
                    f"{name} of {type(self.model).__name__} has {length} modules now, and had {count} when the plan "
                    f"was applied: apply plans after blocks are added or taken away"
                )
        if (twice := next(iter(self.blocks.keys() & plan.repeated), None)) is not None:
            raise SkipError(
                f"{self.blocks[twice]} of {type(self.model).__name__} runs more than once in a pass (looped depth), "
                f"and a plan cannot tell the rounds apart: this model cannot be skipped or resumed block by block"
            )
        for name, gate in self.gates.items():
            if (now := self.model.get_submodule(name)) is not self.modules[name]:
                raise LostGateError(
                    f"{name} is now another module ({type(now).__module__}.{type(now).__qualname__}) than the one "
                    f"the plan was applied to: apply plans after adapters are added, and remove them before"
                )
            if gate.key not in plan.seen and not gate.reachable():
                raise gate.lost(name)
