"""One law: gates decide rows, masks decide positions. Both at once on one network equal one after the other."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from skipguide import find_blocks
from skipguide.vision import LayerMask, SkipNet

BLOCKS = {"BasicBlock": torchvision.models.resnet.BasicBlock, "Bottleneck": torchvision.models.resnet.Bottleneck}


def network(block, gate="rnn"):
    torch.manual_seed(0)
    backbone = torchvision.models.ResNet(BLOCKS[block], [1, 2, 2, 1], num_classes=5)
    net = SkipNet(backbone, gate=gate, image_size=(3, 64, 64)).eval()
    with torch.no_grad():
        for name, value in [*net.named_parameters(), *net.named_buffers()]:
            if value.is_floating_point() and value.ndim == 1:
                value.uniform_(0.5, 1.5) if "var" in name or name.endswith("weight") else value.normal_(0, 0.3)
        net.gates.sharpen(5.0)
    return net


def masks(count=4):
    keep = torch.zeros(count, 64, 64, dtype=torch.bool)
    for row in range(count):
        keep[row, 8 * row : 8 * row + 30, 10:50] = True
    keep[1, ::3] = False
    return keep


def one_after_the_other(net, keep, gates, x):
    """First the gates' work, by hand: every image on a copy of the network that lacks its blocks. Then the mask."""
    rows = []
    for mask, decisions, image in zip(keep, gates, x, strict=True):
        plain = copy.deepcopy(net.backbone)
        for block, runs in zip(list(find_blocks(plain))[1:], decisions, strict=True):
            if not runs:
                short = block.module.downsample
                plain.set_submodule(block.name, nn.Identity() if short is None else short)
        with LayerMask(mask[None]).apply(plain):
            rows.append(plain(image[None]))
    return torch.cat(rows)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("inner", [False, True], ids=["mask on the gated network", "mask on its backbone"])
def test_both_at_once_are_one_after_the_other(block, inner):
    net, x, keep = network(block), torch.randn(4, 3, 64, 64), masks()
    decisions = torch.rand(4, 5, generator=torch.Generator().manual_seed(3)) < 0.5
    with torch.no_grad():
        with LayerMask(keep).apply(net.backbone if inner else net):
            both = net(x, return_routing=True, decisions=decisions)
        wanted = one_after_the_other(net, keep, decisions, x)
    assert torch.allclose(both.logits, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert sum(both.stats.rows.values()) == int(decisions.sum()), "masked rows that are skipped do not run either"


@pytest.mark.parametrize("gate", ["rnn", "ff1", "ff2"])
def test_the_gates_own_decisions_see_only_what_is_visible(gate):
    net, x, keep = network("BasicBlock", gate), torch.randn(4, 3, 64, 64), masks()
    other = torch.where(keep[:, None], x, 9 * torch.randn_like(x))
    with torch.no_grad():
        with LayerMask(keep).apply(net):
            first = net(x, return_routing=True)
            again = net(other, return_routing=True)
        wanted = one_after_the_other(net, keep, first.gates.bool(), x)
    assert torch.equal(first.logits, again.logits) and torch.equal(first.gates, again.gates), (
        "hidden pixels: no influence"
    )
    assert torch.allclose(first.logits, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_full_mask_and_open_gates_are_the_stock_model():
    net, x = network("BasicBlock"), torch.randn(3, 3, 64, 64)
    stock = copy.deepcopy(net.backbone)
    with torch.no_grad():
        with LayerMask(torch.ones(1, 64, 64, dtype=torch.bool)).apply(net):
            both = net(x, return_routing=True, mode="open").logits
        assert torch.equal(both, stock(x))
        with LayerMask(torch.ones(1, 64, 64, dtype=torch.bool)).apply(net):
            masked = net(x, return_routing=True)
        assert torch.equal(masked.logits, net(x)), "a full mask changes nothing of what the gates do"
        with LayerMask(masks(3)).apply(net):
            gated = net(x, return_routing=True, mode="open").logits
        with LayerMask(masks(3)).apply(stock):
            assert torch.allclose(gated, stock(x), rtol=1e-5, atol=1e-6), "open gates change nothing of what masks do"
