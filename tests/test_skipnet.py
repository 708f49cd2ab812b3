"""SkipNet: parity with the published code, rows that are really skipped, and what is refused."""

import copy
import dataclasses
import io
import json
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from demos.benchmarks import skipnet_time
from skipguide import SkipError, find_blocks
from skipguide.vision import SkipNet, skipnet
from skipguide.vision.skipnet import CifarResNet, RecurrentGates
from skipguide.vision.skipnet.backbones import CIFAR, build_backbone
from skipguide.vision.skipnet.objectives import Reinforce, budget_loss, cumulative_rewards, reinforce_loss

GOLDEN = Path(__file__).parent / "golden" / "skipnet"
TINY = {"blocks": [2, 2], "widths": [6, 8], "num_classes": 4}


def golden():
    return load_file(GOLDEN / "sn_ff1_cases.safetensors"), load_file(GOLDEN / "sn_ff1_weights.safetensors")


def tiny(gate="rnn", seed=0, **more):
    torch.manual_seed(seed)
    net = SkipNet({**TINY, **more}, gate=gate, image_size=(3, 16, 16)).eval()
    randomise(net)
    return net


def randomise(net):
    with torch.no_grad():
        for name, value in [*net.named_parameters(), *net.named_buffers()]:
            if value.is_floating_point() and value.ndim == 1:
                value.uniform_(0.5, 1.5) if "var" in name or name.endswith("weight") else value.normal_(0, 0.3)
        net.gates.sharpen(8.0)
        # about half of the decisions to either side
        logits = net(torch.randn(32, 3, 16, 16), return_routing=True, mode="open").gate_logits
        if net.gate == "rnn":
            net.gates.proj.bias -= logits.median()
        else:
            for gate, middle in zip(net.gates.gates, logits.median(0).values, strict=True):
                gate.head.bias[1] -= middle


def residue(model):
    return [(n, sorted(m.__dict__), len(m._forward_hooks)) for n, m in model.named_modules()]


# -- parity ---------------------------------------------------------------------------------------------------------


def test_eval_equals_the_reference_and_half_of_the_blocks_run():
    case, weights = golden()
    net = SkipNet.from_reference_checkpoint(weights)
    with torch.no_grad():
        routing = net(case["x"], return_routing=True)
        logits, gates = net(case["x"], return_gates=True)
    assert torch.allclose(routing.logits, case["eval.logits"], rtol=1e-4, atol=1e-5)
    assert torch.equal(routing.gates, case["eval.hard"]) and torch.equal(gates, case["eval.hard"])
    assert torch.equal(logits, routing.logits)
    assert torch.allclose(routing.probabilities, case["eval.soft"], atol=1e-5)
    # of 8 images x 5 gated blocks
    assert case["eval.hard"].numel() == 40 and sum(routing.stats.rows.values()) == 20


def test_the_blocks_that_the_ledger_counts_are_the_ones_that_ran():
    case, weights = golden()
    net = SkipNet.from_reference_checkpoint(weights)
    rows = {}
    for block in find_blocks(net.backbone):
        block.module.conv2.register_forward_hook(
            lambda module, args, out, name=block.name: rows.update({name: rows.get(name, 0) + len(out)})
        )
    with torch.no_grad():
        routing = net(case["x"], return_routing=True)
    assert rows.pop("groups.0.0") == 8
    assert rows == routing.stats.rows and sum(rows.values()) == 20
    assert routing.blocks.tolist() == (1 + case["eval.hard"].sum(1)).tolist()
    assert routing.computation_percentage == pytest.approx(100 * (20 / 8 + 1) / 6)


def test_soft_gates_equal_the_reference():
    case, weights = golden()
    net = SkipNet.from_reference_checkpoint(weights)
    with torch.no_grad():
        routing = net(case["x"], return_routing=True, mode="soft")
    assert torch.allclose(routing.logits, case["soft_train.logits"], rtol=1e-4, atol=1e-5)
    assert torch.allclose(routing.gates, case["soft_train.masks"], atol=1e-5)


def gradients(net):
    backbone, gates = net.backbone, net.gates.gates
    return {
        "conv1.weight": backbone.conv1.weight.grad,
        "fc.weight": backbone.fc.weight.grad,
        "group1_gate0.linear_layer.weight": gates[0].head.weight.grad,
        "group2_gate0.linear_layer.weight": gates[2].head.weight.grad,
        "group3_gate0.linear_layer.bias": gates[4].head.bias.grad,
    }


def check_gradients(net, case, prefix):
    found = gradients(net)
    names = [name for name in found if f"{prefix}.grad.{name}" in case]
    assert len(names) >= 4
    for name in names:
        wanted = case[f"{prefix}.grad.{name}"]
        assert torch.allclose(
            found[name].view_as(wanted), wanted, rtol=1e-4, atol=1e-5 * max(1, float(wanted.abs().max()))
        ), name


def test_straight_through_gradients_equal_the_reference():
    case, weights = golden()
    net = SkipNet.from_reference_checkpoint(weights)
    routing = net(case["x"], return_routing=True, mode="straight_through")
    loss = functional.cross_entropy(routing.logits, case["y"])
    loss.backward()
    assert loss.item() == pytest.approx(case["sp.loss"].item(), rel=1e-5)
    assert set(routing.gates.detach().unique().tolist()) <= {0.0, 1.0}, "exactly 0 or 1 in the forward pass"
    check_gradients(net, case, "sp")


def test_reinforcement_terms_equal_the_reference():
    case, weights = golden()
    net = SkipNet.from_reference_checkpoint(weights)
    actions = case["hrl.actions"]
    routing = net(case["x"], return_routing=True, decisions=actions.bool())
    each = functional.cross_entropy(routing.logits, case["y"], reduction="none")
    assert torch.allclose(routing.logits, case["hrl.logits"], rtol=1e-4, atol=1e-5)
    assert torch.allclose(routing.probabilities, case["hrl.p_execute"], atol=1e-5)
    assert torch.allclose(each[:, None], case["hrl.pred_loss"], atol=1e-5)
    terms = Reinforce.cifar(alpha=0.1, weight=0.01)
    assert torch.allclose(cumulative_rewards(actions, each, terms), case["hrl.cum_rewards"], atol=1e-5)
    policy = reinforce_loss(routing.gate_logits, actions, each, terms)
    assert policy.item() == pytest.approx(case["hrl.surrogate_cifar_sum"].item(), rel=1e-5)
    imagenet = Reinforce.imagenet(5, alpha=0.1, weight=0.01, detach=True)
    assert torch.allclose(cumulative_rewards(actions, each, imagenet), case["hrl.imagenet.cum_rewards"], atol=1e-6)
    assert reinforce_loss(routing.gate_logits, actions, each, imagenet).item() == pytest.approx(
        case["hrl.imagenet.rl_loss_detached"].item(), rel=1e-4
    )
    (each.mean() + policy).backward()
    check_gradients(net, case, "hrl")


# -- published checkpoints ------------------------------------------------------------------------------------------


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


# -- laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["rnn", "ff1", "ff2"])
@pytest.mark.parametrize("batch", [1, 5])
def test_every_mode_means_the_same_network(gate, batch):
    net, x = tiny(gate), torch.randn(batch, 3, 16, 16)
    before = residue(net.backbone)
    with torch.no_grad():
        hard = net(x, return_routing=True)
        dense = net(x, return_routing=True, mode="straight_through")  # computes every block
        forced = net(x, return_routing=True, decisions=hard.gates.bool())
        opened = net(x, return_routing=True, mode="open")
        sampled = net(x, return_routing=True, mode="sample", generator=torch.Generator().manual_seed(0))
        again = net(x, return_routing=True, mode="sample", generator=torch.Generator().manual_seed(0))
        assert torch.equal(opened.logits, net.backbone(x)), "open gates are bit-equal to the stock network"
    assert torch.allclose(hard.logits, dense.logits, atol=1e-5)
    assert torch.equal(hard.logits, forced.logits)
    assert torch.equal(sampled.gates, again.gates)
    assert sum(hard.stats.rows.values()) == int(hard.gates.sum())
    assert residue(net.backbone) == before


def test_some_gates_of_the_test_networks_are_open_and_some_shut():
    net = tiny("rnn")
    rates = net(torch.randn(40, 3, 16, 16), return_gates=True)[1].mean(0)
    assert 0.05 < float(rates.mean()) < 0.95


def test_gradients_of_skipped_rows_are_those_of_the_blend():
    net, x = tiny("rnn"), torch.randn(6, 3, 16, 16)
    keep = torch.rand(6, 3, generator=torch.Generator().manual_seed(2)) < 0.5
    found = []
    for blended in (False, True):
        net.zero_grad()
        if blended:
            weights = keep.float()
            with net._router.running(lambda place, rows, weights=weights: weights[:, place]):
                logits = net.backbone(x)
        else:
            logits = net(x, return_routing=True, decisions=keep).logits
        logits.square().sum().backward()
        found.append([p.grad.clone() for p in net.backbone.parameters() if p.grad is not None])
    for really, all_of_it in zip(*found, strict=True):
        assert torch.allclose(really, all_of_it, rtol=1e-3, atol=1e-4)


def test_costs_count_what_runs():
    net = tiny("ff2")
    costs = net.costs()
    by_hand = 2 * 16 * 16 * 9 * 6 * 6  # two 3x3 convolutions at 6 channels
    assert costs.blocks[0] == costs.blocks[1] == by_hand
    assert costs.shortcuts == (0, 0, 6 * 8 * 8 * 8, 0)
    assert costs.gates[1:] == (8 * 8 * 9 * 36 + 12, 8 * 8 * 9 * 36 + 12, 4 * 4 * 9 * 64 + 16)
    assert costs.rest == 16 * 16 * 9 * 3 * 6 + 8 * 4
    x = torch.randn(2, 3, 16, 16)
    shut = net(x, return_routing=True, decisions=torch.zeros(3, dtype=torch.bool))
    assert shut.macs.tolist() == [costs.rest + costs.blocks[0] + sum(costs.gates) + costs.shortcuts[2]] * 2
    wide = net.costs((3, 32, 32))
    assert wide.blocks[0] == 4 * costs.blocks[0]


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


def test_sharpening_keeps_hard_decisions():
    for gate in ("rnn", "ff1"):
        net, x = tiny(gate), torch.randn(4, 3, 16, 16)
        before = net(x, return_routing=True)
        net.gates.sharpen(20.0)
        after = net(x, return_routing=True)
        assert torch.equal(before.gates, after.gates)
        assert torch.allclose(20 * before.gate_logits, after.gate_logits, rtol=1e-3, atol=1e-4)
        net.gates.open_by(1e5)
        assert bool((net(x, return_gates=True)[1] == 1).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    net, x = tiny("rnn").to(dtype), torch.randn(4, 3, 16, 16).to(dtype)
    routing = net(x, return_routing=True)
    assert routing.logits.dtype == dtype and bool(torch.isfinite(routing.logits).all())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        mixed = tiny("rnn")(torch.randn(4, 3, 16, 16), return_routing=True)
    assert bool(torch.isfinite(mixed.logits).all())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda():
    net, x = tiny("rnn"), torch.randn(5, 3, 16, 16)
    wanted = net(x, return_routing=True)
    moved = net.cuda()(x.cuda(), return_routing=True)
    assert torch.equal(moved.gates.cpu(), wanted.gates)
    assert torch.allclose(moved.logits.cpu(), wanted.logits, atol=1e-4)
    assert moved.stats.rows == wanted.stats.rows
    opened = net(x.cuda(), return_routing=True, mode="open").logits
    assert torch.equal(opened, net.backbone(x.cuda()))


# -- families -------------------------------------------------------------------------------------------------------

FAMILIES = {
    "torchvision ResNet": lambda: torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 2, 1, 1]),
    "torchvision ResNet, Bottleneck": lambda: torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 2, 1, 1]
    ),
    "torchvision ResNeXt, Wide": lambda: torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], groups=2, width_per_group=16
    ),
    "torchvision RegNet": lambda: torchvision.models.regnet_y_400mf(),
    "torchvision MobileNetV2": lambda: torchvision.models.mobilenet_v2(width_mult=0.25),
    "torchvision MobileNetV3": lambda: torchvision.models.mobilenet_v3_small(width_mult=0.5),
    "torchvision EfficientNet": lambda: torchvision.models.efficientnet_b0(),
    "torchvision ConvNeXt": lambda: torchvision.models.convnext.ConvNeXt(
        [
            torchvision.models.convnext.CNBlockConfig(8, 16, 2),
            torchvision.models.convnext.CNBlockConfig(16, None, 2),
        ]
    ),
    "torchvision VisionTransformer": lambda: torchvision.models.VisionTransformer(64, 16, 3, 2, 16, 32),
    "timm ResNet": lambda: timm.create_model("resnet18"),
    "timm ResNet-D": lambda: timm.create_model("resnet26d"),
    "timm ResNet, BlurPool": lambda: timm.create_model("resnetblur18"),
    "timm SE-ResNet": lambda: timm.create_model("seresnet18"),
    "timm RegNet": lambda: timm.create_model("regnetx_002"),
    "timm EfficientNet": lambda: timm.create_model("efficientnet_b0"),
    "timm MobileNetV3": lambda: timm.create_model("mobilenetv3_small_050"),
    "timm ConvNeXt": lambda: timm.create_model("convnext_atto"),
    "timm ConvNeXtV2": lambda: timm.create_model("convnextv2_atto"),
    "timm VisionTransformer": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=32, depth=3, num_heads=2
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    """Open gates are bit-equal; random decisions equal every image by itself with the blocks really taken out."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if (value.ndim == 1 and "bias" not in name) or "layer_scale" in name:
                value.uniform_(0.5, 1.0)  # layer scales and last norms start at zero or nearly so
            elif value.ndim == 2 and not bool(value.any()):
                value.normal_()  # a head of zeros
    net = SkipNet(model, gate="rnn", image_size=(3, 64, 64)).eval()
    x = torch.randn(3, 3, 64, 64)
    before = residue(model)
    keep = torch.rand(3, len(net.gates), generator=torch.Generator().manual_seed(1)) < 0.5
    with torch.no_grad():
        plain = model(x)
        assert torch.equal(net(x, return_routing=True, mode="open").logits, plain)
        routing = net(x, return_routing=True, decisions=keep)
        assert residue(model) == before
        assert sum(routing.stats.rows.values()) == int(keep.sum())
        rows = [taken_out(model, decisions, x[at : at + 1]) for at, decisions in enumerate(keep)]
    wanted = torch.cat(rows)
    assert torch.allclose(routing.logits, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    assert not torch.allclose(routing.logits, plain, atol=1e-3 * float(plain.abs().max()))


def taken_out(model, decisions, x):
    other = copy.deepcopy(model)
    for block, runs in zip(list(find_blocks(other))[1:], decisions, strict=True):
        if not runs:
            short = getattr(block.module, block.spec.shortcut, None) if block.spec.shortcut else None
            other.set_submodule(block.name, Bypass(short))
    return other(x)


class Bypass(nn.Module):
    def __init__(self, short):
        super().__init__()
        self.short = short

    def forward(self, x):
        return x if self.short is None else self.short(x)


# -- bad input ------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_and_nothing_is_left():
    net, x = tiny("rnn"), torch.randn(2, 3, 16, 16)
    before, wanted = residue(net), net(x)
    keep = torch.ones(2, 3, dtype=torch.bool)
    cases = [
        (lambda: net(x[0]), "images"),
        (lambda: net(x.long()), "floats"),
        (lambda: net(x[:0]), "images"),
        (lambda: net("x"), "images"),
        (lambda: net(torch.randn(2, 1, 16, 16)), "channels"),
        (lambda: net(x, return_routing=True, mode="soggy"), "unknown mode"),
        (lambda: net(x, return_routing=True, decisions=keep.float()), "bool"),
        (lambda: net(x, return_routing=True, decisions=keep[:, :2]), "shape"),
        (lambda: net(x, return_routing=True, decisions=[True]), "bool"),
        (lambda: net(x * torch.nan), "NaN"),
        (lambda: net.costs((3, 16)), "image size"),
        (lambda: net.gates.sharpen(0), "positive"),
        (lambda: skipnet("resnet38", gate="lstm"), "unknown gate"),
        (lambda: skipnet("resnet38", gate=3), "unknown gate"),
        (lambda: skipnet(net), "name"),
        (lambda: SkipNet(nn.Linear(2, 2)), "not described"),
        (lambda: SkipNet({"blocks": [1], "widths": [4]}), "two residual blocks"),
        (lambda: SkipNet({"blocks": [1, 1], "widths": [4]}), "one of each"),
        (lambda: SkipNet(TINY, pretrained=True), "pretrained"),
        (lambda: SkipNet(TINY, gate="ff1", image_size=(3, 2, 2)), "pixels a side"),
        (lambda: SkipNet(TINY, embed=0), "at least 1"),
        (lambda: SkipNet(TINY, image_size=(4, 16, 16)), "does not take images"),
    ]
    for call, words in cases:
        with pytest.raises(SkipError, match=words):
            call()
    assert residue(net) == before and torch.equal(net(x), wanted)


def test_nan_in_a_gate_is_named():
    net, x = tiny("ff2"), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        net.gates.gates[1].head.bias[0] = torch.nan
    with pytest.raises(SkipError, match=r"gates \[1\] gave NaN"):
        net(x)
    net.gates = RecurrentGates(net.gates.channels)
    assert bool(torch.isfinite(net(x)).all())


def test_gates_need_maps():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=2, num_heads=2)
    with pytest.raises(SkipError, match='use gate="rnn"'):
        SkipNet(vit, gate="ff1", image_size=(3, 32, 32))


def test_objectives_refuse_nonsense():
    for bad in ({"reduction": "max"}, {"baseline": "ema"}, {"gamma": 2}, {"alpha": -1}):
        with pytest.raises(SkipError):
            Reinforce(**bad)
    with pytest.raises(SkipError, match=r"\[B, G\]"):
        cumulative_rewards(torch.ones(3), torch.ones(3), Reinforce())
    with pytest.raises(SkipError, match="target"):
        budget_loss(torch.ones(1, 2), 1.0)
    assert Reinforce.from_dict(Reinforce.cifar().to_dict()) == Reinforce.cifar()


def test_rewards_and_their_gradient():
    """gamma, baseline, detach and the gradient of the surrogate, by hand."""
    actions, ce = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]), torch.tensor([0.5, 2.0], requires_grad=True)
    terms = Reinforce(alpha=0.3, gamma=0.5, baseline="none", weight=1.0)
    # r = 0.1 for a skip; the final reward arrives with the last decision
    last = [0.1 - 0.5, 0.0 - 2.0]
    second = [0.1 + 0.5 * last[0], 0.0 + 0.5 * last[1]]
    first = [0.0 + 0.5 * second[0], 0.1 + 0.5 * second[1]]
    wanted = torch.tensor([first, second, last]).T
    assert torch.allclose(cumulative_rewards(actions, ce, terms), wanted)
    logits = torch.zeros(2, 3, requires_grad=True)
    reinforce_loss(logits, actions, ce, terms).backward()
    # d log p(a) / d logit = a - p
    assert torch.allclose(logits.grad, -(actions - 0.5) * wanted / 2)
    assert ce.grad is None
    reinforce_loss(logits, actions, ce, dataclasses.replace(terms, detach=False)).backward()
    assert ce.grad is not None
    centred = dataclasses.replace(terms, baseline="batch_mean")
    logits.grad = None
    reinforce_loss(logits, actions, ce.detach(), centred).backward()
    assert torch.allclose(logits.grad, -(actions - 0.5) * (wanted - wanted.mean(0)) / 2)


def test_the_budget_counts_what_is_above_its_target():
    gates = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert budget_loss(gates).item() == 0.75
    assert budget_loss(gates, 0.5).item() == 0.25
    assert budget_loss(gates, 0.8).item() == 0.0
    assert budget_loss(gates, 0.0, torch.tensor([3.0, 1.0])).item() == pytest.approx((1 + 0.25) / 2)


def test_committed_times_and_their_bar():
    """It holds; in the one case that misses it, the plain network on only those rows takes more than its share."""
    path = Path(skipnet_time.__file__).with_suffix(".json")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".md").read_text(encoding="utf-8") == skipnet_time.text(result)
    assert [line.split(": ")[0] for line in skipnet_time.misses(result)] == ["rows, 16 px, batch 8, share 0.25"]
    rows = [row for name, found in result["cases"].items() if name[:4] == "rows" for b in found.values() for row in b]
    assert {row["share"] for row in rows} >= {0.0, 0.25, 0.5, 0.75, 1.0}
    for row in rows:
        time, limit, share = row["time"]["median"], row["limit"], row["share"]
        assert time <= limit + 0.06 and (time <= share + skipnet_time.BAR or limit > share + 0.05)
