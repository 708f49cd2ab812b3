"""The net of floor plans: what it sees, what its controls change, saved, trained and refused input."""

import json

import pytest
import torch
from helpers.layout_graphs import PAIR, TRIANGLE

from skipguide.errors import SkipError
from skipguide.vision import FloorPlanNet
from skipguide.vision.floorplan import IGNORE, GraphBatch, LayoutGraph, collate, generate_plan

TINY = {"widths": (4, 6, 8), "hidden": 8, "features": 12}


@pytest.mark.parametrize("graph", ["map", "attention", "vector", None])
@torch.no_grad()
def test_any_size_and_rows_apart(graph):
    torch.manual_seed(0)
    net = FloorPlanNet(graph=graph, **TINY).eval()
    for height, width in ((1, 1), (7, 20), (32, 33)):
        images = torch.rand(2, 3, height, width)
        graphs = [TRIANGLE, PAIR] if graph else None
        both = net(images, graphs)
        assert both.shape == (2, 11, height, width)
        for row in range(2):
            one = net(images[row : row + 1], graphs[row : row + 1] if graphs else None)
            torch.testing.assert_close(one[0], both[row], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("graph", ["map", "attention", "vector"])
@torch.no_grad()
def test_graph_matters_and_the_order_of_rooms_does_not(graph):
    torch.manual_seed(0)
    net = FloorPlanNet(graph=graph, **TINY).eval()
    image = torch.rand(1, 3, 16, 16)
    plain = net(image, [TRIANGLE])
    turned = LayoutGraph([2, 0, 1], [[1, 2, 0], [2, 0, 1]], [0, 1, 2])
    torch.testing.assert_close(net(image, [turned]), plain, atol=1e-5, rtol=1e-5)
    for other in (PAIR, TRIANGLE.without_edges(), LayoutGraph([0, 1, 2], TRIANGLE.edges, [2, 2, 2])):
        assert (net(image, [other]) - plain).abs().max() > 1e-5
    torch.testing.assert_close(net(image, GraphBatch.of([TRIANGLE])), plain)


@torch.no_grad()
def test_vector_is_the_same_everywhere_and_map_is_not():
    torch.manual_seed(0)
    for graph, uniform in (("vector", True), ("map", False)):
        net = FloorPlanNet(graph=graph, **TINY).eval()
        bottom = torch.zeros(1, 8, 5, 7)
        drawn = net._condition(bottom, GraphBatch.of([TRIANGLE]))
        assert (drawn.std((2, 3)).max() < 1e-6) == uniform


def test_controls_change_the_net():
    def count(**arguments):
        return sum(p.numel() for p in FloorPlanNet(**(TINY | arguments)).parameters())

    full = count()
    assert count(skips=False) < full
    assert count(reinject=False) < full
    assert count(graph=None) < full
    # decoder nodes see skip, upsampled and image channels: 3x3 kernels on 3 channels, widths 4 and 6
    assert full - count(reinject=False) == 9 * 3 * (4 + 6)
    assert full - count(skips=False) == 9 * (4 * 4 + 6 * 6)
    with torch.device("meta"):
        assert sum(p.numel() for p in FloorPlanNet().parameters()) < 12_000_000  # published: 280 million


@pytest.mark.parametrize("skips", [False, True])
def test_skips_off_hides_the_encoder_from_the_decoder(skips):
    """With the deepest features held fixed, the encoder and the image matter only through the connections."""
    torch.manual_seed(0)
    net = FloorPlanNet(skips=skips, reinject=False, **TINY).eval()
    image = torch.rand(1, 3, 16, 16, requires_grad=True)
    deepest = torch.rand(1, 8, 4, 4)
    net.node_at(2, 0).register_forward_hook(lambda *_: deepest)
    out = net(image, [PAIR])
    assert out.shape == (1, 11, 16, 16) and out.std() > 0
    lateral = [*net.node_at(0, 0).parameters(), *net.node_at(1, 0).parameters()]
    found = torch.autograd.grad(out.sum(), [image, *lateral, net.node_at(0, 2).conv1.weight], allow_unused=True)
    assert found[-1].abs().max() > 0
    assert [grad is not None and bool(grad.any()) for grad in (found[0], found[1])] == [skips, skips]
    assert all((grad is not None) == skips for grad in found[:-1])
    with torch.no_grad():
        net.node_at(0, 0).bn2.bias += 1.0
        net.node_at(1, 0).bn2.bias += 1.0
        assert torch.equal(net(image, [PAIR]), out) == (not skips)


@torch.no_grad()
def test_timm_encoder_and_save(tmp_path):
    torch.manual_seed(0)
    net = FloorPlanNet("resnet10t", graph="attention", hidden=8, features=12).eval()
    image = torch.rand(1, 3, 40, 50)
    plain = net(image, [TRIANGLE])
    assert plain.shape == (1, 11, 40, 50)
    net.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["graph"] == "attention"
    again = FloorPlanNet.from_pretrained(tmp_path).eval()
    assert torch.equal(again(image, [TRIANGLE]), plain)


def test_a_few_steps_learn():
    torch.manual_seed(0)
    net = FloorPlanNet(**TINY, dropout=0.0)
    images, graphs, targets = collate([generate_plan(seed, 24) for seed in range(4)])
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(net(images, graphs), targets, ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert losses[-1] < 0.75 * losses[0]


def test_bad_input_of_the_net():
    net = FloorPlanNet(**TINY)
    image = torch.rand(1, 3, 8, 8)
    for arguments, message in (
        ((torch.rand(1, 1, 8, 8), [PAIR]), r"\[N, 3, H, W\]"),
        ((image * float("nan"), [PAIR]), "NaN"),
        ((image,), "got none"),
        ((image, PAIR), r"pass \[graph\]"),
        ((image, []), "at least one layout graph"),
        ((image, [PAIR, PAIR]), "each of 1 images; got 2"),
        ((image, [LayoutGraph([4])]), r"zones 0\.\.3; got 4"),
        ((image, [LayoutGraph([0, 1], [[0], [1]], [3])]), "edge types"),
    ):
        with pytest.raises(SkipError, match=message):
            net(*arguments)
    with pytest.raises(SkipError, match="image alone"):
        FloorPlanNet(graph=None, **TINY)(image, [PAIR])
    with pytest.raises(SkipError, match="'vector' or None"):
        FloorPlanNet(graph="tokens")
    with pytest.raises(SkipError, match="as a whole number of at least 1"):
        FloorPlanNet(map_size=0)
    with pytest.raises(SkipError, match="all have stride"), torch.device("meta"):
        FloorPlanNet("vit_tiny_patch16_224")
