"""Heads of UNet++ together: their mean, and going deeper only where they differ."""

import math

import pytest
import torch
from helpers.tiny_unetpp import TINY

import skipguide.vision.unetpp.network as unetpp
from skipguide.vision import UNetPlusPlus


@torch.no_grad()
def test_mean_is_the_mean_of_the_probabilities():
    model = UNetPlusPlus(**TINY).eval()
    images = torch.rand(2, 3, 24, 24)
    expected = torch.stack([head.sigmoid() for head in model(images)]).mean(0)
    torch.testing.assert_close(model(images, head="mean").sigmoid(), expected)
    extreme = unetpp.mean_of_probabilities([torch.tensor(200.0), torch.tensor(100.0)])
    assert extreme == pytest.approx(100 + math.log(2))


def disagreement(first, second):
    a, b = first > 0, second > 0
    union = int((a | b).sum())
    return int((a != b).sum()) / union if union else 0.0


@torch.no_grad()
def test_adaptive_goes_deeper_only_where_heads_differ():
    torch.manual_seed(1)
    model = UNetPlusPlus(in_channels=1, **TINY).eval()
    images = torch.rand(6, 1, 24, 24) * torch.tensor([0.0, 0.2, 1, 5, 20, 80]).view(-1, 1, 1, 1)
    for conv in model.head.values():
        conv.bias -= 0.02
    full = model(images)
    for tolerance in (0.0, 0.1, 0.5, 1.0):
        run = model.run(images, "adaptive", tolerance)
        for row in range(6):
            level = 2
            while level < 3 and disagreement(full[level - 2][row], full[level - 1][row]) > tolerance:
                level += 1
            assert run.levels[row] == level
            torch.testing.assert_close(run.logits[row], full[level - 1][row], atol=1e-5, rtol=1e-4)
        assert run.rows_run[0, 2] == 6
        assert run.rows_run.get((0, 3), 0) == int((run.levels == 3).sum())
    assert torch.equal(model(images, head="adaptive", tolerance=1.0), full[1])
    shallow = UNetPlusPlus(in_channels=1, widths=(4, 8)).eval()
    assert torch.equal(shallow(images, head="adaptive"), shallow(images, head=1))


@torch.no_grad()
def test_adaptive_on_a_timm_backbone():
    torch.manual_seed(2)
    model = UNetPlusPlus("resnet10t").eval()
    images = torch.rand(3, 3, 50, 40)
    images[1] = 0
    run = model.run(images, "adaptive", 0.0)
    full = model(images)
    for row, level in enumerate(run.levels.tolist()):
        torch.testing.assert_close(run.logits[row], full[level - 1][row], atol=1e-4, rtol=1e-4)
