"""SkipNet: the laws of routing on tiny networks and on every family, the committed times, and what is refused."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from helpers.replicas import replica_of
from helpers.tiny_skipnet import TINY, residue, tiny
from torch import nn

from demos.benchmarks import skipnet_resnet110, skipnet_time
from skipguide import SkipError, find_blocks
from skipguide.vision import SkipNet, skipnet
from skipguide.vision.skipnet import RecurrentGates


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


def test_whole_runs_make_one_by_their_medians():
    def result(*medians):
        rows = [{"share": 0.5, "time": {"median": m, "quartiles": [m - 0.1, m + 0.2]}, "limit": m / 2} for m in medians]
        return [{"cases": {"even": {"8": [row]}}, "machine": {"time": str(n)}} for n, row in enumerate(rows)]

    one = skipnet_time.joined(result(0.6, 0.9, 0.5))
    assert one["cases"]["even"]["8"] == [
        {"share": 0.5, "time": {"median": 0.6, "quartiles": [0.5, 0.8]}, "limit": 0.3, "each": [0.6, 0.9, 0.5]}
    ]
    assert [machine["time"] for machine in one["machine"]] == ["0", "1", "2"]


def test_committed_times_and_their_bar():
    """With even decisions it holds everywhere: the committed result says so, and its text is what the result says.

    The result is the median of whole runs, none of them left out: the tightest case lies at the bar in some.
    """
    path = Path(skipnet_time.__file__).with_suffix(".json")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".md").read_text(encoding="utf-8") == skipnet_time.text(result)
    assert {name: set(batches) for name, batches in result["cases"].items() if name.startswith("even")} == {
        "even, 16 px": {"1", "8", "64"},
        "even, 56 px": {"1", "8", "64"},
    }
    assert skipnet_time.misses(result) == []
    rows = [row for found in result["cases"].values() for batch in found.values() for row in batch if "limit" in row]
    assert {row["share"] for row in rows} >= {0.0, 0.25, 0.5, 0.75, 1.0}
    for row in rows:
        assert row["time"]["median"] <= max(row["limit"] + 0.06, row["share"] + skipnet_time.BAR)


def test_a_routed_resnet110_is_measured_at_every_share():
    rows = skipnet_resnet110.part(2, 1)
    assert [row["share"] for row in rows] == pytest.approx(skipnet_resnet110.SHARES, abs=0.02)
    assert all(len(row["time"]) == 1 and row["time"][0] > 0 for row in rows)


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


@pytest.mark.parametrize("training", [False, True])
def test_replicas_of_data_parallel_have_gates_of_their_own(training):
    """The published code trains so: one replica a GPU, each in its thread."""
    net = tiny().train(training)
    images = torch.randn(6, 3, 16, 16)
    halves = images.split(3)
    expected = [net(half, return_gates=True) for half in halves]
    before = residue(net)
    replicas = [replica_of(net) for _ in halves]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda pair: pair[0](pair[1], return_gates=True), zip(replicas, halves, strict=True)))
    assert residue(net) == before
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    if training:
        sum(logits.sum() for logits, _ in found).backward()
        assert all(p.grad is not None for p in net.gates.proj.parameters())
