"""Offload: diffusers' group offloading loads several blocks at a time; passes that leave some of them out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


class SharedGroups:
    """Loads and releases groups of offloaded blocks in a pass in which not every block runs.

    The first block of a group loads it and the last one releases it. Where the first does not run, the first that does
    has to load; where the last does not, the end of the pass has to release. Groups of which no block runs stay where
    they are.
    """

    __slots__ = ("groups", "loaded")

    def __init__(self, groups: dict[int, Any]) -> None:
        self.groups = groups  # module -> group
        self.loaded: dict[int, Any] = {}

    @classmethod
    def among(cls, modules: Iterable[nn.Module]) -> SharedGroups | None:
        """The groups of several blocks that diffusers' hooks on these modules name; None without any."""
        groups = {}
        for module in modules:
            if (registry := module.__dict__.get("_diffusers_hook")) is None:
                continue
            group = getattr(registry.get_hook("group_offloading"), "group", None)
            if group is not None and len(group.modules) > 1:
                groups[id(module)] = group
        return cls(groups) if groups else None

    def runs(self, module: nn.Module) -> None:
        """Note that a module is about to run; its group is loaded then."""
        group = self.groups.get(id(module))
        if group is None:
            return
        if id(group) not in self.loaded and module is not group.onload_leader:
            group.onload_()
        self.loaded[id(group)] = group
        if module is group.offload_leader:  # releases it after it ran
            del self.loaded[id(group)]

    def release(self) -> None:
        """At the end of a pass: release the groups that are still loaded."""
        while self.loaded:
            self.loaded.popitem()[1].offload_()
