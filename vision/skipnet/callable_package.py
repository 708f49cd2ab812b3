"""Makes the package `skipguide.vision.skipnet` callable like the function that has its name.

Importing a package binds its name on the parent, over the function that is called the same. So
`skipguide.vision.skipnet`, whichever of the two a caller got hold of, can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from skipguide.vision.skipnet.net import SkipNet, skipnet


class _CallablePackage(ModuleType):
    def __call__(self, name: str, gate: str = "rnn", num_classes: int = 10, pretrained: Any = None) -> SkipNet:
        return skipnet(name, gate, num_classes, pretrained)


def make_callable(package: str) -> None:
    """Let a package be called as `skipnet` is."""
    sys.modules[package].__class__ = _CallablePackage
