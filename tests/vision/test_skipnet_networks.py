"""SkipNet: networks by name, of the published sizes, with pretrained weights, saved and copied."""

import copy
import io

import pytest
import timm
import torch
import torchvision
from helpers.tiny_skipnet import tiny

from skipguide import SkipError, find_blocks
from skipguide.vision import SkipNet, skipnet
from skipguide.vision.skipnet import CifarResNet
from skipguide.vision.skipnet.backbones import CIFAR, build_backbone


def test_published_sizes():
    """Parameters and MACs of the paper's networks (ResNet-38)."""
    for gate, millions in (("rnn", 0.572), ("ff1", 1.149), ("ff2", 0.857)):
        net = SkipNet("resnet38", gate)
        # the published code has one more gate, which decides nothing
        extra = 0.06 if gate == "ff1" else 0.04
        assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=extra + 0.02)
    assert net.costs().dense / 1e6 == pytest.approx(83.3, abs=0.1)
    assert {name: len(find_blocks(build_backbone(name))) for name in ("resnet38", "resnet74")} == {
        "resnet38": 18, "resnet74": 36,
    }  # fmt: skip


def test_names():
    assert isinstance(build_backbone("resnet152"), CifarResNet) and CIFAR["resnet152"] == 25
    with torch.device("meta"):
        assert isinstance(build_backbone("resnet152", 1000), torchvision.models.ResNet)
        assert isinstance(build_backbone("imagenet_resnet152", 10), torchvision.models.ResNet)
    for name in ("resnet19", "cifar_resnet18", "imagenet_resnet38", "timm/no", "torchvision/no", "hub/resnet18"):
        with pytest.raises(SkipError, match=r"unknown|no model|expected"):
            build_backbone(name)
    for weights in ("torchvision:NONE", "keras", 3):
        with pytest.raises(SkipError, match=r"weights|pretrained"):
            build_backbone("resnet18", 10, weights)
    with pytest.raises(SkipError, match="no ImageNet weights"):
        build_backbone("resnet38", 10, "torchvision")


def test_the_package_and_the_function_share_a_name():
    import skipguide.vision
    import skipguide.vision.skipnet as package

    assert package is skipguide.vision.skipnet
    net = package("resnet38", gate="ff2", num_classes=3)
    assert isinstance(net, SkipNet) and isinstance(skipnet("resnet38"), SkipNet)


def test_pretrained_weights_are_loaded(monkeypatch):
    """As far as the download: the weights that would have come are made up."""
    torch.manual_seed(3)
    sent = {k: torch.rand_like(v.float()).to(v.dtype) for k, v in torchvision.models.resnet18().state_dict().items()}
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *a, **k: sent)
    net = skipnet("resnet18", num_classes=10, pretrained="torchvision:IMAGENET1K_V1")
    assert torch.equal(net.backbone.layer3[1].conv2.weight, sent["layer3.1.conv2.weight"])
    assert net.backbone.fc.out_features == 10
    whole = skipnet("resnet18", num_classes=1000, pretrained=True)
    assert torch.equal(whole.backbone.fc.weight, sent["fc.weight"])
    asked = []
    create = timm.create_model

    def created(name, pretrained, num_classes):
        asked.append((name, pretrained, num_classes))
        return create(name, num_classes=num_classes)

    monkeypatch.setattr(timm, "create_model", created)
    skipnet("resnet18", num_classes=5, pretrained="timm")
    skipnet("timm/resnet18", num_classes=5, pretrained="timm:a1_in1k")
    assert asked == [("resnet18", True, 5), ("resnet18.a1_in1k", True, 5)]


def test_save_load_copy_and_pickle(tmp_path):
    net, x = tiny("rnn"), torch.randn(3, 3, 16, 16)
    net.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"model.safetensors", "config.json"}
    loaded = SkipNet.from_pretrained(tmp_path).eval()
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for other in (loaded, copy.deepcopy(net), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), net(x))
        with torch.no_grad():
            other.backbone.fc.bias += 1
        assert not torch.equal(other(x), net(x)), "a copy has modules of its own"
