"""SkipNet (arXiv 1711.09485): gates that decide per image which residual blocks run, and a network that obeys them.

Example:
    >>> import torch
    >>> from skipguide.vision.skipnet import skipnet
    >>> net = skipnet("resnet38", gate="rnn", num_classes=10).eval()
    >>> routing = net(torch.randn(2, 3, 32, 32), return_routing=True)
    >>> routing.logits.shape, routing.gates.shape, routing.blocks.shape
    (torch.Size([2, 10]), torch.Size([2, 17]), torch.Size([2]))
"""

from skipguide.vision.skipnet.backbones import CifarResNet, build_backbone
from skipguide.vision.skipnet.callable_package import make_callable
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

make_callable(__name__)
