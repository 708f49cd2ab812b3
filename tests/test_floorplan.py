"""Floor plans: the graph convolution against dense algebra, the net, the data set's files, made-up plans, pictures."""

import doctest
import importlib
import json
import pickle

import networkx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipguide.errors import SkipError
from skipguide.vision import FloorPlanNet, GraphConv
from skipguide.vision.floorplan import (
    BACKGROUND,
    CLASSES,
    IGNORE,
    STRUCTURE,
    ZONES,
    GraphBatch,
    LayoutGraph,
    MSDFolder,
    Plan,
    collate,
    draw_plan,
    generate_plan,
    preprocess,
    save_submission,
    write_plan,
)
from skipguide.vision.floorplan.generate import PROGRAMMES
from skipguide.vision.floorplan.msd import read_graph, to_classes
from skipguide.vision.floorplan.regions import grow, innermost, outside, regions

TINY = {"widths": (4, 6, 8), "hidden": 8, "features": 12}
TRIANGLE = LayoutGraph([0, 1, 2], [[0, 1, 2], [1, 2, 0]], [0, 1, 2])
PAIR = LayoutGraph([3, 1], [[0], [1]])


def dense(weights, bias, x, edges, types=None):
    """`D^-1/2 (A + I) D^-1/2 X W + b` with full matrices; the last weight is the loop's."""
    count = len(x)
    adjacency = torch.zeros(len(weights), count, count, dtype=x.dtype)
    for at, (source, target) in enumerate(edges.T.tolist()):
        adjacency[0 if types is None else types[at], target, source] += 1
    adjacency[-1] += torch.eye(count, dtype=x.dtype)
    scale = adjacency.sum((0, 2)).rsqrt()
    return sum(scale[:, None] * a * scale @ x @ w for a, w in zip(adjacency, weights, strict=True)) + bias


# --- graphs


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(0, 20))
def test_graph_conv_is_the_normalised_convolution(seed, count, many):
    torch.manual_seed(seed)
    edges = torch.randint(count, (2, many))
    edges = edges[:, edges[0] != edges[1]]
    x = torch.randn(count, 4)
    plain = GraphConv(4, 5)
    torch.nn.init.normal_(plain.bias)
    assert (plain(x, edges) - dense(plain.weight, plain.bias, x, edges)).abs().max() < 1e-6 * (1 + x.abs().max())
    typed = GraphConv(4, 5, edge_types=3)
    types = torch.randint(3, (edges.shape[1],))
    expected = dense(typed.weight, typed.bias, x, edges, types.tolist())
    torch.testing.assert_close(typed(x, edges, types), expected, atol=2e-6, rtol=1e-5)
    with torch.no_grad():  # equal matrices: the plain form
        typed.weight.copy_(plain.weight.expand_as(typed.weight))
        typed.bias.copy_(plain.bias)
    torch.testing.assert_close(typed(x, edges, types), plain(x, edges), atol=1e-6, rtol=1e-5)


def test_graph_conv_adds_one_loop_to_every_node():
    conv = GraphConv(2, 2)
    x = torch.randn(3, 2)
    edges = torch.tensor([[0, 1], [1, 0]])
    looped = torch.cat([edges, torch.tensor([[2, 0], [2, 0]])], dim=1)
    torch.testing.assert_close(conv(x, edges), conv(x, looped))
    none = torch.zeros(2, 0, dtype=torch.long)
    torch.testing.assert_close(conv(x, none), x @ conv.weight[0] + conv.bias)


def test_against_torch_geometric_where_installed():
    geometric = pytest.importorskip("torch_geometric.nn")
    theirs = geometric.GCNConv(4, 5)
    ours = GraphConv(4, 5)
    with torch.no_grad():
        ours.weight[0].copy_(theirs.lin.weight.T)
        ours.bias.copy_(theirs.bias)
    x, edges = torch.randn(6, 4), torch.randint(6, (2, 10))
    torch.testing.assert_close(ours(x, edges), theirs(x, edges), atol=1e-6, rtol=1e-6)


def test_bad_graphs():
    with pytest.raises(SkipError, match="at least one room"):
        LayoutGraph([])
    with pytest.raises(SkipError, match=r"rooms \[5\]; the graph has rooms 0\.\.1"):
        LayoutGraph([0, 1], [[0], [5]])
    with pytest.raises(SkipError, match=r"rooms \[-1\]"):
        LayoutGraph([0, 1], [[0], [-1]])
    with pytest.raises(SkipError, match="one type for each of 1"):
        LayoutGraph([0, 1], [[0], [1]], [0, 1])
    with pytest.raises(SkipError, match=r"edges \[2, E\]"):
        LayoutGraph([0, 1], [[0, 1]])
    with pytest.raises(SkipError, match="negative"):
        LayoutGraph([-1])
    with pytest.raises(SkipError, match="at least one layout graph"):
        GraphBatch.of([])
    with pytest.raises(SkipError, match="from_networkx"):
        GraphBatch.of([networkx.Graph()])
    conv = GraphConv(2, 2, edge_types=2)
    x, edges = torch.rand(3, 2), torch.tensor([[0], [1]])
    for arguments, message in (
        ((torch.rand(3, 4), edges, torch.tensor([0])), "node features"),
        ((torch.rand(0, 2), edges, torch.tensor([0])), "at least one node"),
        ((x, torch.tensor([[0], [3]]), torch.tensor([0])), "nodes up to 3"),
        ((x, edges.float(), torch.tensor([0])), "int64"),
        ((x, edges), "pass edge_type"),
        ((x, edges, torch.tensor([2])), "edge types"),
        ((x, edges, torch.tensor([0.0])), "edge types as whole numbers"),
        ((x, edges, [0]), "edge_type as a tensor"),
        ((x, [[0], [1]], torch.tensor([0])), "edge_index as a tensor"),
        ((x, -edges, torch.tensor([0])), "from -1 on"),
    ):
        with pytest.raises(SkipError, match=message):
            conv(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [([0.5, 1.7],), ([0, 1], [[0], [0.9]]), ([0, 1], [[0], [1]], [0.5]), ([float("nan")],), (["bath"],)],
    ids=str,
)
def test_numbers_of_a_graph_are_whole(arguments):
    with pytest.raises(SkipError, match="whole numbers"):
        LayoutGraph(*arguments)


def test_graph_conv_counts_many_neighbours_in_low_precision():
    torch.manual_seed(0)
    spokes = torch.stack([torch.arange(1, 1001), torch.zeros(1000, dtype=torch.long)])
    edges, x = torch.cat([spokes, spokes.flip(0)], dim=1), torch.rand(1001, 4)
    conv = GraphConv(4, 8)
    expected = conv(x, edges).detach()
    found = conv.bfloat16()(x.bfloat16(), edges)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.03 * float(expected.abs().max()), rtol=0.0)


def test_two_connections_between_two_rooms_survive_networkx():
    graph = LayoutGraph([0, 1], [[0, 0], [1, 1]], [0, 2])
    assert LayoutGraph.from_networkx(graph.to_networkx()).edge_types.tolist() == [0, 2]
    assert type(TRIANGLE.to_networkx()) is networkx.Graph


def test_networkx_round_trip_and_bad_ones():
    again = LayoutGraph.from_networkx(TRIANGLE.to_networkx())
    for name in ("zones", "edges", "edge_types"):
        assert torch.equal(getattr(again, name), getattr(TRIANGLE, name))
    graph = networkx.Graph()
    graph.add_node("a", zoning_type="Zone2")
    graph.add_node("b", zoning_type=2)
    graph.add_edge("a", "b", connectivity="passage")
    read = LayoutGraph.from_networkx(graph)
    assert (read.zones.tolist(), read.edge_types.tolist()) == ([1, 2], [2])
    graph.add_edge("a", "ghost", connectivity="door")
    with pytest.raises(SkipError, match="'ghost' has no 'zoning_type'"):
        LayoutGraph.from_networkx(graph)
    graph.add_node("ghost", zoning_type="Kitchen")
    with pytest.raises(SkipError, match="Zone1"):
        LayoutGraph.from_networkx(graph)
    for value in ([1], float("nan"), 1.5):
        graph.add_node("ghost", zoning_type=value)
        with pytest.raises(SkipError, match="whole number"):
            LayoutGraph.from_networkx(graph)
    graph.add_node("ghost", zoning_type=0)
    graph.add_edge("a", "ghost", connectivity="window")
    with pytest.raises(SkipError, match="got 'window'"):
        LayoutGraph.from_networkx(graph)
    with pytest.raises(SkipError, match="at least one room"):
        LayoutGraph.from_networkx(networkx.Graph())


def test_batch_joins_both_ways():
    batch = GraphBatch.of([TRIANGLE, PAIR]).to("cpu")
    assert batch.batch.tolist() == [0, 0, 0, 1, 1]
    assert sorted(map(tuple, batch.edge_index.T.tolist()))[-2:] == [(3, 4), (4, 3)]
    assert batch.edge_index.shape == (2, 8)
    assert batch.size == 2


# --- the net


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


@torch.no_grad()
def test_skips_off_hides_the_encoder_from_the_decoder():
    net = FloorPlanNet(skips=False, reinject=False, **TINY).eval()
    assert net(torch.rand(1, 3, 16, 16), [PAIR]).shape == (1, 11, 16, 16)
    assert net.node_at(0, 2).conv1.in_channels == 6


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
    with pytest.raises(SkipError, match="count from 1"):
        FloorPlanNet(map_size=0)
    with pytest.raises(SkipError, match="all have stride"), torch.device("meta"):
        FloorPlanNet("vit_tiny_patch16_224")


# --- regions


def slow_regions(values):
    height, width = values.shape
    labels = -np.ones(values.shape, dtype=int)
    for start in range(values.size):
        todo = [divmod(start, width)]
        while todo:
            y, x = todo.pop()
            if labels[y, x] < 0 and values[y, x] == values.flat[start]:
                labels[y, x] = start
                near = ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
                todo += [(a, b) for a, b in near if 0 <= a < height and 0 <= b < width]
    return labels


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))
def test_regions_equal_a_plain_flood_fill(height, width, seed):
    values = np.random.default_rng(seed).integers(0, 3, (height, width))
    assert np.array_equal(regions(values), slow_regions(values))


def test_outside_and_gaps():
    walls = np.zeros((12, 12), dtype=bool)
    walls[2:10, 2] = walls[2:10, 9] = walls[2, 2:10] = walls[9, 2:10] = True
    closed = outside(walls)
    assert closed[0, 0]
    assert not closed[5, 5]
    assert closed.sum() == 144 - 64
    walls[2, 5:7] = False  # a door of two pixels
    assert outside(walls)[5, 5]
    kept = outside(walls, gap=1)
    assert kept[0, 0]
    assert not kept[5, 5]
    assert not (kept & walls).any()
    touching = np.ones((4, 4), dtype=bool)  # walls on the border leave no outside
    touching[1:3, 1:3] = False
    assert not outside(touching).any()


def test_innermost_is_deep_inside():
    mask = np.zeros((20, 20), dtype=bool)
    mask[2:9, 3:18] = True
    mask[9:19, 3:5] = True
    row, column = innermost(mask)
    assert not (~mask & grow(np.pad(np.ones((1, 1), bool), ((row, 19 - row), (column, 19 - column))), 3)).any()
    assert innermost(np.eye(3, dtype=bool)) == (1, 1)


# --- the data set's files


def test_preprocess_channels():
    walls = np.full((8, 8, 3), 255, dtype=np.uint8)
    walls[2:6, 2:6, 0] = 0
    walls[3:5, 3:5, 0] = 255
    image = preprocess(walls)
    assert image.shape == (3, 8, 8)
    assert image[:, 0, 0].tolist() == [1, 1, 1]  # outside
    assert image[:, 2, 2].tolist() == [pytest.approx(128 / 255), 0, 0]  # wall
    assert image[:, 3, 3].tolist() == [0, 0, 1]  # inside
    for bad in (
        np.zeros((0, 4)),
        np.zeros(3),
        np.full((3, 3), -1),
        np.full((3, 3), np.nan),
        np.full((3, 3), 300),
        1 - np.eye(3),
    ):
        with pytest.raises(SkipError, match="expected"):
            preprocess(bad)
    with pytest.raises(SkipError, match="gap"):
        preprocess(walls, gap=-1)


def test_class_mapping():
    values = np.arange(14).reshape(1, 14)
    assert to_classes(values)[0].tolist() == [*range(10), IGNORE, IGNORE, IGNORE, BACKGROUND]
    with pytest.raises(SkipError, match=r"0\.\.13"):
        to_classes(np.array([[14]]))
    assert sorted(c for zone in ZONES for c in zone) == list(range(STRUCTURE))
    assert len(CLASSES) == 11


def test_folder_round_trip(tmp_path):
    plans = [generate_plan(seed, 32) for seed in range(3)]
    plans = [Plan(plan.image, plan.graph, plan.target, str(9 + at)) for at, plan in enumerate(plans)]
    for plan in plans:
        write_plan(plan, tmp_path)
    folder = MSDFolder(tmp_path)
    assert folder.ids == ["9", "10", "11"]  # by number, not by letter
    for plan, read in zip(plans, folder, strict=False):
        assert torch.equal(read.image, plan.image)
        assert torch.equal(read.target, plan.target)
        assert torch.equal(read.graph.edges, plan.graph.edges)
    small = MSDFolder(tmp_path, size=16)[0]
    assert small.image.shape == (3, 16, 16)
    assert torch.equal(small.target, plans[0].target[::2, ::2])
    loader = torch.utils.data.DataLoader(MSDFolder(tmp_path), batch_size=3, collate_fn=collate)
    images, graphs, targets = next(iter(loader))
    assert images.shape == (3, 3, 32, 32)
    assert graphs.size == 3
    assert targets.shape == (3, 32, 32)
    for path in (tmp_path / "full_out").iterdir():
        path.unlink()
    assert MSDFolder(tmp_path)[1].target is None  # the test set
    assert collate([MSDFolder(tmp_path)[0]])[2] is None


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(SkipError, match="found none"):
        MSDFolder(tmp_path)
    with pytest.raises(SkipError, match="size of at least 1"):
        MSDFolder(tmp_path, size=0)
    plan = generate_plan(0)
    write_plan(plan, tmp_path)
    with pytest.raises(SkipError, match="name and a target"):
        write_plan(Plan(plan.image, plan.graph), tmp_path)
    name = plan.name
    (tmp_path / "struct_in" / "other.npy").write_bytes(b"")
    with pytest.raises(SkipError, match=r"lack their struct_in or graph_in, such as \['other'\]"):
        MSDFolder(tmp_path)
    (tmp_path / "struct_in" / "other.npy").unlink()
    (tmp_path / "full_out" / f"{name}.npy").rename(tmp_path / "full_out" / "other.npy")
    with pytest.raises(SkipError, match="lack their full_out"):
        MSDFolder(tmp_path)
    np.save(tmp_path / "full_out" / f"{name}.npy", np.zeros((4, 4)))
    with pytest.raises(SkipError, match="differ"):
        MSDFolder(tmp_path)[0]
    (tmp_path / "full_out" / f"{name}.npy").write_bytes(b"nothing")
    with pytest.raises(SkipError, match="not a readable array"):
        MSDFolder(tmp_path)[0]


def test_a_plan_is_written_whole_and_replaces_nothing_unasked(tmp_path):
    plan = generate_plan(0, 24)
    write_plan(plan, tmp_path)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    other = generate_plan(1, 24)
    other = Plan(other.image, other.graph, other.target, plan.name)
    with pytest.raises(SkipError, match="exists already"):
        write_plan(other, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == kept
    write_plan(other, tmp_path, overwrite=True)
    assert torch.equal(MSDFolder(tmp_path)[0].target, other.target)
    unknown = Plan(plan.image, LayoutGraph([0, 1], [[0], [1]], [7]), plan.target, "unknown")
    with pytest.raises(SkipError, match="got number 7"):
        write_plan(unknown, tmp_path)
    assert len(list(tmp_path.rglob("*.*"))) == 3, "nothing half-written"


class Malicious:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_graph_file_runs_no_code(tmp_path, capsys):
    path = tmp_path / "graph.pickle"
    path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(SkipError, match=r"builtins\.print"):
        read_graph(path)
    assert "code ran" not in capsys.readouterr().out
    for content, message in (
        (b"", "not a pickled"),
        (b"garbage", "not a pickled"),
        (b"Igarbage\n.", "not a pickled"),  # a ValueError of pickle
        (pickle.dumps([1]), "holds a list"),
        (pickle.dumps(networkx.Graph()), "at least one room"),
    ):
        path.write_bytes(content)
        with pytest.raises(SkipError, match=message):
            read_graph(path)
    graph = TRIANGLE.to_networkx()
    graph.nodes[0]["zoning_type"] = np.int64(3)
    path.write_bytes(pickle.dumps(graph))
    assert read_graph(path).zones.tolist() == [3, 1, 2]


def test_submission(tmp_path):
    from PIL import Image

    classes = torch.tensor([[0, 9], [10, 8]])
    path = save_submission(classes, tmp_path / "out", "42")
    assert path.name == "42.png"
    image = Image.open(path)
    assert image.mode == "L"
    assert np.asarray(image).tolist() == [[0, 9], [13, 8]]
    logits = torch.nn.functional.one_hot(classes, 11).permute(2, 0, 1).float()
    assert np.asarray(Image.open(save_submission(logits, tmp_path, "43"))).tolist() == [[0, 9], [13, 8]]
    for bad in (torch.tensor([[11]]), torch.rand(3, 3), torch.zeros(3, dtype=torch.long), classes[None]):
        with pytest.raises(SkipError, match="expected classes"):
            save_submission(bad, tmp_path, "44")


# --- made-up plans


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(24, 70))
def test_made_up_plans_keep_their_rules(seed, size):
    plan = generate_plan(seed, size)
    target = plan.target.numpy()
    graph = plan.graph.to_networkx()
    assert networkx.is_connected(graph)
    rooms = regions(target)
    areas = {}
    for number in np.unique(rooms):
        kind = int(target.ravel()[number])
        if kind < STRUCTURE:
            areas[number] = (int((rooms == number).sum()), kind)
    assert len(areas) == len(plan.graph) >= 2
    # zones go by rank in size, in the order of the programme
    order = PROGRAMMES[plan.name.split("-")[0]]
    ranked = sorted(areas.values(), reverse=True)
    assert sorted(plan.graph.zones.tolist()) == sorted(order[: len(ranked)])
    sizes = [area for area, _ in ranked]
    for rank, (area, kind) in enumerate(ranked):
        if sizes.count(area) == 1:
            assert kind in ZONES[order[rank]]
    # what a room is within its zone goes by the number of its connections
    kinds = sorted(kind for _, kind in areas.values())
    table = {0: (0, 0, 0, 0), 1: (2, 3, 1, 4), 2: (7, 6, 5, 5), 3: (8, 8, 8, 8)}
    zones = plan.graph.zones.tolist()
    assert kinds == sorted(table[zones[r]][min(graph.degree[r], 4) - 1] for r in graph.nodes)
    # the image: the outside is exactly the background
    assert torch.equal(plan.image[1] == 1, plan.target == BACKGROUND)


def test_plans_are_repeatable_and_differ():
    one, two, other = generate_plan(5), generate_plan(5), generate_plan(6)
    assert torch.equal(one.image, two.image)
    assert torch.equal(one.target, two.target)
    assert torch.equal(one.graph.edges, two.graph.edges)
    assert not torch.equal(one.target, other.target)
    named = [generate_plan(7, programme=name) for name in PROGRAMMES]
    assert len({tuple(plan.target.flatten().tolist()) for plan in named}) == 3
    # nothing in the image tells the programme
    assert len({tuple(plan.image[1].flatten().tolist()) for plan in named}) == 1
    whole = generate_plan(7, keep_walls=1.0)
    assert torch.equal(whole.image[2] == 0, whole.target == STRUCTURE)
    for arguments, message in (
        ({"size": 8}, "24"),
        ({"rooms": (1, 4)}, "2 to 8"),
        ({"rooms": (5, 4)}, "2 to 8"),
        ({"keep_walls": 2.0}, "keep_walls"),
        ({"programme": "castle"}, "family"),
    ):
        with pytest.raises(SkipError, match=message):
            generate_plan(0, **arguments)
    with pytest.raises(SkipError, match="one size"):
        collate([generate_plan(0, 24), generate_plan(0, 32)])


# --- pictures


def test_picture_has_rooms_names_and_legend():
    plan = generate_plan(3, 64)
    bare = draw_plan(plan.target, labels=False, legend=False)
    assert bare.height == bare.width == 384
    named = draw_plan(plan.target, legend=False)
    assert named.size == bare.size
    assert named.tobytes() != bare.tobytes()
    zoom = bare.height // 64
    walls = (plan.target == STRUCTURE).numpy().repeat(zoom, 0).repeat(zoom, 1)
    assert np.array_equal(np.asarray(named)[walls], np.asarray(bare)[walls]), "a name leaves its room"
    full = draw_plan(plan.target, title="A made-up plan")
    assert full.width > bare.width
    assert full.height > bare.height
    logits = torch.nn.functional.one_hot(plan.target, 11).permute(2, 0, 1).float()
    assert draw_plan(logits).tobytes() == draw_plan(plan.target).tobytes()
    draw_plan(torch.full((3, 3), IGNORE))
    with pytest.raises(SkipError, match="expected classes"):
        draw_plan(torch.rand(3, 3))
    with pytest.raises(SkipError, match="expected classes"):
        draw_plan(plan.target[None])  # classes of a batch are no logits


@pytest.mark.parametrize("name", ["", ".graph", ".net", ".regions", ".msd", ".generate"])
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(f"skipguide.vision.floorplan{name}"))
    assert result.attempted
    assert not result.failed
