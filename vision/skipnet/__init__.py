"""SkipNet (arXiv 1711.09485): gates that decide per image which residual blocks run, and a network that obeys them.

Example:
    >>> import torch
    >>> from skipguide.vision.skipnet import skipnet
    >>> net = skipnet("resnet38", gate="rnn", num_classes=10).eval()
    >>> routing = net(torch.randn(2, 3, 32, 32), return_routing=True)
    >>> routing.logits.shape, routing.gates.shape, routing.blocks.shape
    (torch.Size([2, 10]), torch.Size([2, 17]), torch.Size([2]))
"""

import sys
from types import ModuleType
from typing import Any

from skipguide.vision.skipnet.backbones import CifarResNet, build_backbone
from skipguide.vision.skipnet.gates import FeedForwardGates, Gates, RecurrentGates
from skipguide.vision.skipnet.net import SkipNet, skipnet
from skipguide.vision.skipnet.routing import Costs, Routing

__all__ = [
    "CifarResNet",
    "Costs",
    "FeedForwardGates",
    "Gates",
    "RecurrentGates",
    "Routing",
    "SkipNet",
    "build_backbone",
    "skipnet",
]


class _CallablePackage(ModuleType):
    """Importing a package binds its name on the parent, over the function that is called the same.

    So `skipguide.vision.skipnet`, whichever of the two a caller got hold of, can be called.
    """

    def __call__(self, name: str, gate: str = "rnn", num_classes: int = 10, pretrained: Any = None) -> SkipNet:
        return skipnet(name, gate, num_classes, pretrained)


sys.modules[__name__].__class__ = _CallablePackage
