"""Weights of UNet++: saved, pruned and trained."""

import json

import pytest
import timm.models._builder
import torch
from helpers.tiny_unetpp import TINY

from skipguide.vision import UNetPlusPlus
from skipguide.vision.segmentation import deep_supervision_loss


class FetchedError(Exception):
    pass


def fetch(*_, **__):
    raise FetchedError


def test_save_and_load(tmp_path, monkeypatch):
    monkeypatch.setattr(timm.models._builder, "load_pretrained", fetch)
    with pytest.raises(FetchedError):  # here timm would have asked for its weights
        UNetPlusPlus("resnet10t", pretrained=True)
    torch.manual_seed(0)
    images = torch.rand(1, 3, 32, 32)
    for model in (UNetPlusPlus(classes=2, **TINY), UNetPlusPlus("resnet10t", encoder_args={"drop_path_rate": 0.1})):
        for saved in (model.eval(), model.pruned(2)):
            saved.save_pretrained(tmp_path / "model")
            again = UNetPlusPlus.from_pretrained(tmp_path / "model").eval()
            with torch.no_grad():
                assert torch.equal(again(images, head=2), saved(images, head=2))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["depth"] == 2
    config["pretrained"] = True  # as if timm's weights had been loaded: they are not fetched again
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    again = UNetPlusPlus.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(again(images, head=2), saved(images, head=2))


def test_pruned_keeps_device_type_mode_and_frozen_weights():
    model = UNetPlusPlus(**TINY).double().eval()
    model.node_at(0, 0).conv1.weight.requires_grad_(False)
    smaller = model.pruned(1)
    weight = smaller.node_at(0, 0).conv1.weight
    assert not smaller.training
    assert not weight.requires_grad
    assert weight.data_ptr() != model.node_at(0, 0).conv1.weight.data_ptr()
    assert torch.equal(weight, model.node_at(0, 0).conv1.weight)


def test_gradients_reach_every_weight_and_a_step_lowers_the_loss():
    torch.manual_seed(0)
    model = UNetPlusPlus(in_channels=1, **TINY)
    images = torch.rand(4, 1, 16, 16)
    target = (images > 0.5).float()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        loss = deep_supervision_loss(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert losses[-1] < 0.7 * losses[0]
