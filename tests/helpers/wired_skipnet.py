"""A tiny SkipNet as it is made, and pictures of wires to train it on."""

import torch
from helpers.tiny_skipnet import TINY
from torch.utils.data import TensorDataset

from demos.skipnet.wires import make_wires
from skipguide.vision import SkipNet


def tiny(seed=0):
    torch.manual_seed(seed)
    return SkipNet(TINY, gate="rnn", image_size=(3, 10, 10)).eval()


def data(count=40, seed=0):
    wires = make_wires(count, 10, 4, seed)
    return TensorDataset(wires.images, wires.labels)


def state(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)
