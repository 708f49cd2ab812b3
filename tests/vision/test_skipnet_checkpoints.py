"""SkipNet: published checkpoints come back, damaged ones are refused."""

import pytest
import torch
import torchvision
from helpers.tiny_skipnet import tiny
from safetensors.torch import save_file

from skipguide import SkipError
from skipguide.vision import SkipNet


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
@pytest.mark.parametrize("prefix", ["", "module."])
def test_cifar_checkpoints_come_back(gate, prefix, tmp_path):
    net = tiny(gate, blocks=[1, 2, 2], widths=[4, 6, 8])
    state = {prefix + key: value for key, value in published(net, gate).items()}
    x = torch.randn(3, 3, 16, 16)
    path = tmp_path / "model_best.pth.tar"
    torch.save({"iter": 1, "arch": "x", "state_dict": state, "best_prec1": 1.0}, path)
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
    ]
    for source, words in cases:
        with pytest.raises(SkipError, match=words):
            SkipNet.from_reference_checkpoint(source)
    with pytest.raises(SkipError, match="gates of kind"):
        SkipNet.from_reference_checkpoint(state, gate="rnn")
