"""SkipNet: networks by name, saved and copied; published checkpoints come back, damaged ones are refused."""

import copy
import io

import pytest
import timm
import torch
import torchvision
from helpers.tiny_skipnet import tiny
from safetensors.torch import save_file

from skipguide import SkipError, find_blocks
from skipguide.vision import LayerMask, SkipNet, skipnet
from skipguide.vision.skipnet import CifarResNet
from skipguide.vision.skipnet.backbones import CIFAR, build_backbone
from zoo.masking import close


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


def strided(net):
    """The network with torch's own convolution in its projections."""
    net = copy.deepcopy(net)
    for group in net.groups[1:]:
        ours = group[0].downsample[0]
        group[0].downsample[0] = stock = torch.nn.Conv2d(ours.in_channels, ours.out_channels, 1, 2, bias=False)
        stock.weight = ours.weight
    return net


@pytest.mark.numerics
@pytest.mark.parametrize("size", [15, 16])
def test_a_narrow_network_is_a_strided_one(size):
    torch.manual_seed(0)
    net = CifarResNet([1, 1, 1], [3, 4, 16], 4).double().eval()
    stock, x = strided(net), torch.randn(2, 3, size, size, dtype=torch.double)
    close(net(x).detach(), stock(x).detach())
    for wanted, got in zip(
        torch.autograd.grad(stock(x).square().sum(), [*stock.parameters()]),
        torch.autograd.grad(net(x).square().sum(), [*net.parameters()]),
        strict=True,
    ):
        close(got, wanted)
    keep = torch.zeros(1, size, size, dtype=torch.bool)
    keep[:, 3:11, 5:] = True
    for model in (net, stock):  # layer masking follows it, as the strided one
        with LayerMask(keep).apply(model):
            model.masked = model(x).detach()
    close(net.masked, stock.masked)
    assert not torch.equal(net.masked, net(x))


@pytest.mark.numerics
def test_narrow_projections_are_not_strided_in_channels_last(monkeypatch):
    """oneDNN writes past the end of its memory there (its issue 6035): a worker of the tests died of it."""
    torch.manual_seed(0)
    calls, conv2d = [], torch.nn.functional.conv2d

    def recorded(x, weight, bias=None, stride=1, *more):
        calls.append((tuple(weight.shape), max(torch.nn.modules.utils._pair(stride))))
        return conv2d(x, weight, bias, stride, *more)

    monkeypatch.setattr(torch.nn.functional, "conv2d", recorded)
    net = CifarResNet([1, 1, 1], [3, 16, 20], 4).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 16, 16)
    net(x.contiguous(memory_format=torch.channels_last)).square().sum().backward()
    assert ((16, 3, 1, 1), 1) in calls and ((20, 16, 1, 1), 2) in calls, "as many channels as a vector holds are well"
    wanted = copy.deepcopy(net).double()
    wanted.zero_grad()
    wanted(x.double()).square().sum().backward()
    for got, right in zip(net.parameters(), wanted.parameters(), strict=True):
        assert torch.allclose(got.grad.double(), right.grad, rtol=1e-3, atol=1e-3)


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


def published(net, kind):
    """The keys that ucbdrive/skipnet writes for a network of ours, with its unused last gate and twin projections."""
    out, state = {}, net.state_dict()
    group = "groups." if "backbone.groups.0.0.conv1.weight" in state else "layer"
    for key, value in state.items():
        if key.startswith(f"backbone.{group}"):
            g, i, rest = key.removeprefix(f"backbone.{group}").split(".", 2)
            g = int(g) + (group == "groups.")
            out[f"group{g}_layer{i}.{rest}"] = value
            if rest.startswith("downsample."):
                out[f"group{g}_ds{i}.{rest.removeprefix('downsample.')}"] = value
        elif key.startswith("backbone."):
            out[key.removeprefix("backbone.")] = value
    blocks = [
        (int(n.split(".")[-2]) + 1 if group == "groups." else int(n.split(".")[0][5:]), n.split(".")[-1])
        for n in net.block_names
    ]
    body = {1: "conv1", 2: "bn1", 4: "conv2", 5: "bn2"} if kind == "ff1" else {0: "conv1", 1: "bn1"}
    for place, (g, i) in enumerate(blocks):
        source = min(place, len(blocks) - 2)  # the gate after the last block exists, and is of that block's width
        for key, value in state.items():
            name = f"group{g}_gate{i}"
            if kind == "rnn" and key.startswith(f"gates.embed.{source}."):
                value = value if place < len(blocks) - 1 else torch.zeros(7)
                out[f"{name}.1.{key.split('.')[-1]}"] = value[..., None, None] if value.ndim == 2 else value
            elif kind != "rnn" and key.startswith(f"gates.gates.{source}."):
                part, *rest = key.split(".")[3:]
                if part == "head":
                    out[f"{name}.linear_layer.{rest[0]}"] = value[..., None, None] if value.ndim == 2 else value
                else:
                    out[f"{name}.{body[int(rest[0])]}.{rest[1]}"] = value
    for key, value in state.items():
        if key.startswith("gates.rnn."):
            out[f"control.rnn.{key.split('.')[-1]}_l0"] = value
        elif key.startswith("gates.proj."):
            # a Linear in the CIFAR code, a 1x1 convolution in the ImageNet code
            out[f"control.proj.{key.split('.')[-1]}"] = (
                value[..., None, None] if group == "layer" and value.ndim == 2 else value
            )
    return out


@pytest.mark.parametrize("gate", ["rnn", "ff1", "ff2"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module.module."])
def test_cifar_checkpoints_come_back(gate, prefix, tmp_path):
    net = tiny(gate, blocks=[1, 2, 2], widths=[4, 6, 8])
    state = {prefix + key: value for key, value in published(net, gate).items()}
    x = torch.randn(3, 3, 16, 16)
    path = tmp_path / "model_best.pth.tar"
    torch.save({"iter": 1, "arch": "x", "model": state, "best_prec1": 1.0}, path)
    save_file({k: v.clone() for k, v in state.items()}, tmp_path / "m.safetensors")
    for source in (state, {"state_dict": state}, path, str(tmp_path / "m.safetensors")):
        found = SkipNet.from_reference_checkpoint(source)
        assert torch.equal(found(x), net(x)) and found.gate == gate


def test_imagenet_checkpoints_come_back():
    torch.manual_seed(0)
    backbone = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 2, 1, 1], num_classes=7)
    net = SkipNet(backbone, gate="rnn", image_size=(3, 64, 64)).eval()
    found = SkipNet.from_reference_checkpoint(published(net, "rnn"))
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(found(x), net(x))


def test_plain_networks_are_a_start():
    torch.manual_seed(0)
    base = torchvision.models.resnet18(num_classes=6).eval()
    net = SkipNet.from_reference_checkpoint({f"module.{k}": v for k, v in base.state_dict().items()}, gate="rnn")
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(net(x, return_routing=True, mode="open").logits, base(x))


def test_damaged_checkpoints_are_refused(tmp_path):
    state = published(tiny("ff1"), "ff1")
    (tmp_path / "no.pth").write_bytes(b"not a checkpoint")
    (tmp_path / "no.safetensors").write_bytes(b"not a checkpoint")
    cases = [
        ({}, "state dict"),
        ([1], "state dict"),
        ({"a": torch.ones(1)}, "keys of a SkipNet checkpoint"),
        ({"conv1.weight": 3}, "tensors"),
        ({**state, "fc.weight": state["fc.weight"] * torch.nan}, "NaN"),
        ({k: v for k, v in state.items() if "group1_layer1" not in k}, "gate|gaps|no"),
        ({k: v for k, v in state.items() if k != "group2_layer1.conv1.weight"}, "missing"),
        ({**state, "fc.weight": torch.ones(4, 9)}, "shapes"),
        ({**state, "group2_ds0.0.weight": state["group2_ds0.0.weight"] + 1}, "differs"),
        ({k: v for k, v in state.items() if "gate0" not in k}, "no gate|gate"),
        (tmp_path / "no.pth", "cannot read"),
        (tmp_path / "no.safetensors", "cannot read"),
        (tmp_path / "absent.pth", "cannot read"),
        (tmp_path / "whole.pth", r"cannot read .*whole pickled model.*state_dict\(\)"),
        (state | {f"module.{key}": value for key, value in state.items()}, "twice, once with a prefix"),
    ]
    torch.save(torch.nn.Linear(1, 1), tmp_path / "whole.pth")
    for source, words in cases:
        with pytest.raises(SkipError, match=words) as caught:
            SkipNet.from_reference_checkpoint(source)
        assert "weights_only" not in str(caught.value), "torch's advice to run what the file holds is not passed on"
    with pytest.raises(SkipError, match="gates of kind"):
        SkipNet.from_reference_checkpoint(state, gate="rnn")


def test_weights_that_cannot_be_downloaded(monkeypatch):
    """Offline, torchvision raises an URLError and timm what the hub raises; both are an OSError."""
    from urllib.error import URLError

    import torchvision

    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", offline)
    with pytest.raises(SkipError, match=r"weights of resnet18 are not on this machine.*no network"):
        skipnet("resnet18", num_classes=1000, pretrained=True)


def test_a_network_that_was_traced_into_one_graph_is_refused():
    traced = torch.fx.symbolic_trace(torchvision.models.resnet18(num_classes=4).eval())
    with pytest.raises(SkipError, match=r"do not run as modules.*before"):
        SkipNet(traced)
