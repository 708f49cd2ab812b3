"""A tiny ResNet in which every block matters."""

import torch
from torchvision.models.resnet import BasicBlock, ResNet


def resnet(**more):
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 2, 1, 1], num_classes=5, **more)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "bn" in name:
                parameter.uniform_(0.5, 1.5)
    return model.eval()
