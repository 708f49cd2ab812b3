"""Narrow convolutional networks with images and masks for them."""

import pytest
import timm
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet


def randomized(model, seed=0):
    """Eval mode, with batch norms that do something to zeros."""
    g = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.normal_(0, 0.2, generator=g)
                module.running_var.uniform_(0.5, 2, generator=g)
                module.weight.uniform_(0.5, 1.5, generator=g)
                module.bias.normal_(0, 0.3, generator=g)
    return model.eval()


def tiny(block=Bottleneck, classes=5, **kwargs):
    """A ResNet in torchvision's layout, narrow."""
    torch.manual_seed(0)
    model = ResNet(block, [1, 1, 1, 1], num_classes=classes, **kwargs)
    return randomized(model)


@pytest.fixture(scope="module")
def model():
    return tiny(BasicBlock)


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def keep():
    keep = torch.zeros(3, 1, 64, 64, dtype=torch.bool)
    keep[0, :, 10:40, 20:60] = True
    cells = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(2)) > 0.5
    keep[1] = cells.repeat_interleave(8, 1).repeat_interleave(8, 2)
    keep[2, :, 30:50, 33:45] = True
    return keep


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def state(model):
    return {
        name: (set(module.__dict__), {k: len(v) for k, v in module.__dict__.items() if k.endswith("_hooks")})
        for name, module in model.named_modules()
    }


def vit(kind=timm.models.vision_transformer.VisionTransformer):
    torch.manual_seed(0)
    return kind(img_size=64, patch_size=16, embed_dim=16, depth=2, num_heads=2, num_classes=4).eval()
