"""UNet++ obeys its laws on twelve backbones, at any size: a head is the pruned network's output."""

import pytest
import torch
from helpers.tiny_unetpp import TINY, parameters
from hypothesis import given, settings
from hypothesis import strategies as st

from skipguide.vision import UNetPlusPlus

# Families, shrunk where their smallest member is large.
FAMILIES = {
    "resnet10t": {},
    "mobilenetv3_small_050": {},
    "efficientnet_lite0": {},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "regnetx_002": {},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)},  # NHWC
    "pvt_v2_b0": {},
    "hrnet_w18_small": {},
    "densenet121": {"growth_rate": 8, "block_config": (2, 2, 2, 2)},
    "maxvit_rmlp_pico_rw_256": {"img_size": 64},
    "fastvit_t8": {},
    "edgenext_xx_small": {},
}


@torch.no_grad()
def laws(model, images):
    model = model.eval()
    full = model(images)
    sizes = []
    for level, expected in zip(model.levels, full, strict=True):
        run = model.run(images, head=level)
        assert run.logits.shape == (len(images), model.classes, *images.shape[-2:])
        assert set(run.rows_run) == {(i, j) for i in range(level + 1) for j in range(level + 1 - i)}
        assert torch.equal(run.logits, expected)
        smaller = model.pruned(level)
        assert torch.equal(smaller(images), expected)
        sizes.append(parameters(smaller))
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize(("name", "arguments"), FAMILIES.items(), ids=str)
def test_every_family(name, arguments):
    torch.manual_seed(0)
    model = UNetPlusPlus(name, classes=2, encoder_args=arguments)
    laws(model, torch.rand(1, 3, 50, 70))


@torch.no_grad()
def test_a_timm_encoder_stops_where_the_head_does():
    model = UNetPlusPlus("resnet10t").eval()
    ran = []
    for name, module in model.encoder.model.named_children():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    model(torch.rand(1, 3, 32, 32), head=1)
    assert "layer1" in ran
    assert "layer2" not in ran
    ran.clear()
    model(torch.rand(1, 3, 32, 32), head=2)
    assert "layer2" in ran
    assert "layer3" not in ran


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_any_size(height, width):
    laws(UNetPlusPlus(classes=1, in_channels=1, **TINY), torch.rand(2, 1, height, width))


def test_full_resolution_level():
    model = UNetPlusPlus("resnet10t", full_resolution=True)
    assert model.widths[0] == 16
    assert model.levels == [1, 2, 3, 4, 5]
    laws(model, torch.rand(1, 3, 40, 33))
