"""The table of `vision/README.md`: what can be exported gives the same elsewhere, what cannot says so."""

import re
from pathlib import Path

import pytest
import torch
from helpers.tiny_skipnet import tiny
from helpers.traced import traced
from helpers.versions import needs
from torch import nn
from torch.export import Dim

from skipguide.errors import SkipError
from skipguide.vision import FloorPlanNet, LayerMask, LayoutGraph, SkipDEQ, UNetPlusPlus
from skipguide.vision.floorplan import GraphBatch

README = Path(__file__).resolve().parents[2] / "vision" / "README.md"
ANY = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
other_sizes = needs("torch", "2.14", "exporters of older ones guard on the sizes of the example")
DENSE = ("straight_through", "soft", "open")


def unet(**more):
    torch.manual_seed(0)
    return UNetPlusPlus(widths=(4, 6, 8), **more).eval().requires_grad_(False)


def plan_net(graph="map"):
    torch.manual_seed(0)
    return FloorPlanNet(widths=(4, 6, 8), hidden=8, features=16, graph=graph).eval().requires_grad_(False)


def rooms(*counts):
    return GraphBatch.of([LayoutGraph([i % 4 for i in range(n)], [[*range(n - 1)], [*range(1, n)]]) for n in counts])


def exported(model, images, dims=None, **more):
    shapes = None if dims is None else {"images": dims, **dict.fromkeys(more)}
    return torch.export.export(model, (images,), more, dynamic_shapes=shapes, strict=False).module()


@other_sizes
@pytest.mark.parametrize("head", [1, "mean"])
def test_unetpp_at_other_sizes(head):
    model, images, others = unet(), torch.rand(2, 3, 32, 32), torch.rand(3, 3, 45, 51)
    expected = model(others, head=head)
    torch.testing.assert_close(exported(model, images, ANY, head=head)(others, head=head), expected)
    torch.testing.assert_close(traced(lambda x: model(x, head=head), images)(others), expected)


def test_unetpp_with_a_timm_encoder_has_the_size_of_its_example():
    model, images = unet(encoder="resnet18", depth=2), torch.rand(1, 3, 50, 40)
    program = exported(model, images, head=1)
    torch.testing.assert_close(program(images, head=1), model(images, head=1))
    with pytest.raises(Exception, match=r"shape|[Gg]uard"):
        program(torch.rand(1, 3, 66, 40), head=1)
    with pytest.raises(SkipError, match=r"size of its example.*torch\.export"):
        traced(lambda x: model(x, head=1), images)


def test_an_adaptive_depth_is_refused():
    model, images = unet(), torch.rand(2, 3, 16, 16)
    with pytest.raises(SkipError, match="decides image by image"):
        traced(lambda x: model(x, head="adaptive"), images)
    with pytest.raises(SkipError, match="decides image by image"):
        exported(model, images, head="adaptive")


@other_sizes
@pytest.mark.parametrize("graph", ["map", "vector", "attention"])
def test_floor_plans_with_other_graphs(graph):
    net, images = plan_net(graph), torch.rand(2, 3, 30, 45)
    many = ({2: Dim.AUTO, 3: Dim.AUTO}, [{0: Dim.AUTO}, {1: Dim.AUTO}, {0: Dim.AUTO}, {0: Dim.AUTO}, None])
    program = torch.export.export(net, (images, rooms(3, 4)), dynamic_shapes=many, strict=False).module()
    others, graphs = torch.rand(2, 3, 41, 28), rooms(6, 2)
    torch.testing.assert_close(program(others, graphs), net(others, graphs))


@pytest.mark.parametrize("gate", ["rnn", "ff2"])
@pytest.mark.parametrize("mode", DENSE)
def test_skipnet_in_its_dense_modes(mode, gate):
    net, images, others = tiny(gate).requires_grad_(False), torch.randn(3, 3, 16, 16), torch.randn(5, 3, 18, 18)
    expected = net(others, return_routing=True, mode=mode).logits
    if mode == "straight_through":
        torch.testing.assert_close(expected, net(others), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(exported(net, images, ANY, mode=mode)(others, mode=mode), expected)
    torch.testing.assert_close(traced(lambda x: net(x, mode=mode), images)(others), expected)


@pytest.mark.parametrize("more", [{}, {"mode": "sample"}, {"decisions": torch.ones(3, dtype=torch.bool)}], ids=str)
def test_skipnet_that_skips_rows_is_refused(more):
    net, images = tiny().requires_grad_(False), torch.randn(3, 3, 16, 16)
    with pytest.raises(SkipError, match="straight_through"):
        traced(lambda x: net(x, **more), images)
    with pytest.raises(SkipError, match="straight_through"):
        exported(net, images, **more)


def test_masks_and_equilibria_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()).eval().requires_grad_(False)
    images = torch.rand(1, 3, 8, 8)
    keep = torch.ones(1, 8, 8, dtype=torch.bool)
    keep[:, :4] = False
    with LayerMask(keep).apply(model), pytest.raises(SkipError, match="values of its mask"):
        traced(lambda x: model(x), images)
    with pytest.raises(SkipError, match="iterates until"):
        torch.export.export(SkipDEQ(lambda z, x: z / 2 + x), (images,))


@pytest.mark.parametrize("which", ["unet", "timm", "plan", "skipnet"])
def test_onnx_gives_the_same(which, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    images, graphs = torch.rand(2, 3, 16, 16), rooms(3, 4)
    model, args, kwargs, flat = {
        "unet": lambda: (unet(), (images,), {"head": 2}, [images]),
        "timm": lambda: (unet(encoder="resnet18", depth=2), (images,), {"head": 2}, [images]),
        "plan": lambda: (
            plan_net(), (images, graphs), {}, [images, graphs.zones, graphs.edge_index, graphs.edge_type, graphs.batch],
        ),
        "skipnet": lambda: (tiny().requires_grad_(False), (images,), {"mode": "straight_through"}, [images]),
    }[which]()  # fmt: skip
    program = torch.export.export(model, args, kwargs, strict=False)
    torch.onnx.export(program, args, kwargs=kwargs, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    feeds = {given.name: value.numpy() for given, value in zip(session.get_inputs(), flat, strict=True)}
    found = torch.from_numpy(session.run(None, feeds)[0])
    torch.testing.assert_close(found, model(*args, **kwargs), atol=1e-4, rtol=1e-4)


def test_every_row_of_the_table_has_a_test():
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    found = {name: ("refused" in export, "refused" in trace) for name, export, trace in rows[1:]}
    assert found == {
        'UNet++, a head or `"mean"`': (False, False),
        "UNet++ with a timm encoder": (False, True),
        'UNet++, `head="adaptive"`': (True, True),
        "FloorPlanNet with a graph, as a `GraphBatch`": (False, True),
        'SkipNet, `mode="straight_through"`, `"soft"`, `"open"`': (False, False),
        'SkipNet, `mode="hard"`, `"sample"`, `decisions=`': (True, True),
        "SkipDEQ": (True, True),
        "a model under a `LayerMask`": (True, True),
        "SkipTuner": (False, False),
    }
