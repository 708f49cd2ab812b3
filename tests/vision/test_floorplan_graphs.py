"""Layout graphs: through networkx and back, joined, refused; their convolution equals dense algebra."""

import copyreg
import pickle

import networkx
import numpy as np
import pytest
import torch
from helpers.dispatched import Dispatched
from helpers.layout_graphs import PAIR, TRIANGLE
from hypothesis import given, settings
from hypothesis import strategies as st

from skipguide.errors import SkipError
from skipguide.vision import GraphConv
from skipguide.vision.floorplan import GraphBatch, LayoutGraph
from skipguide.vision.floorplan.graph_files import read_graph


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
    with pytest.raises(SkipError, match="count from 0; got a negative one"):
        LayoutGraph([-1])
    with pytest.raises(SkipError, match="count from 0; got a negative one"):
        LayoutGraph([0, 1], [[0], [1]], [-1])
    with pytest.raises(SkipError, match="at least one layout graph"):
        GraphBatch.of([])
    with pytest.raises(SkipError, match="from_networkx"):
        GraphBatch.of([networkx.Graph()])
    conv = GraphConv(2, 2, edge_types=2)
    x, edges = torch.rand(3, 2), torch.tensor([[0], [1]])
    for arguments, message in (
        ((torch.rand(3, 4), edges, torch.tensor([0])), r"node features \[R, 2\] .*got \(3, 4\)"),
        ((torch.rand(0, 2), edges, torch.tensor([0])), r"at least one node; got \(0, 2\)"),
        ((x, torch.tensor([[0], [3]]), torch.tensor([0])), "nodes up to 3, from 0 on; there are 3"),
        ((x, edges.float(), torch.tensor([0])), r"int64; got torch.float32 \(2, 1\)"),
        ((x, edges), "pass edge_type"),
        ((x, edges, torch.tensor([2])), r"edge types 0\.\.1; got \[2\]"),
        ((x, edges, torch.tensor([0.0])), "edge types as whole numbers; got torch.float32"),
        ((x, edges, [0]), "edge_type as a tensor; got list"),
        ((x, [[0], [1]], torch.tensor([0])), "edge_index as a tensor; got list"),
        ((x, -edges, torch.tensor([0])), "nodes up to 0, from -1 on"),
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


def test_a_room_is_not_connected_with_itself():
    graph = LayoutGraph([0, 1], [[0, 0, 1], [0, 1, 1]], [1, 2, 0])
    assert graph.edges.tolist() == [[0], [1]] and graph.edge_types.tolist() == [2]
    assert LayoutGraph([0], [[0], [0]]).edges.shape == (2, 0)


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


def dense(weights, bias, x, edges, types=None):
    """`D^-1/2 (A + I) D^-1/2 X W + b` with full matrices; the last weight is the loop's."""
    count = len(x)
    adjacency = torch.zeros(len(weights), count, count, dtype=x.dtype)
    for at, (source, target) in enumerate(edges.T.tolist()):
        adjacency[0 if types is None else types[at], target, source] += 1
    adjacency[-1] += torch.eye(count, dtype=x.dtype)
    scale = adjacency.sum((0, 2)).rsqrt()
    return sum(scale[:, None] * a * scale @ x @ w for a, w in zip(adjacency, weights, strict=True)) + bias


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


def test_a_layer_waits_for_the_device_to_check_its_edges_and_no_more():
    conv, edges = GraphConv(4, 5, edge_types=3), torch.tensor([[0, 1, 2], [1, 0, 2]])
    with Dispatched() as ran:
        conv(torch.eye(4), edges, torch.tensor([0, 1, 2]))
    assert ran.names.count("aminmax") == 2 and not ran.waits


def test_against_torch_geometric_where_installed():
    geometric = pytest.importorskip("torch_geometric.nn")
    theirs = geometric.GCNConv(4, 5)
    ours = GraphConv(4, 5)
    with torch.no_grad():
        ours.weight[0].copy_(theirs.lin.weight.T)
        ours.bias.copy_(theirs.bias)
    x, edges = torch.randn(6, 4), torch.randint(6, (2, 10))
    torch.testing.assert_close(ours(x, edges), theirs(x, edges), atol=1e-6, rtol=1e-6)


def test_graph_conv_counts_many_neighbours_in_low_precision():
    torch.manual_seed(0)
    spokes = torch.stack([torch.arange(1, 1001), torch.zeros(1000, dtype=torch.long)])
    edges, x = torch.cat([spokes, spokes.flip(0)], dim=1), torch.rand(1001, 4)
    conv = GraphConv(4, 8)
    expected = conv(x, edges).detach()
    found = conv.bfloat16()(x.bfloat16(), edges)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.03 * float(expected.abs().max()), rtol=0.0)


def attributed(values):
    graph = networkx.Graph()
    for room, value in enumerate(values):
        graph.add_node(room, zoning_type=value, centroid=np.array([0.5, 1.0]), area=np.float32(3), big=np.bool_(True))
    graph.add_edge(0, 1, connectivity=np.str_("door"))
    return graph


@pytest.mark.parametrize("protocol", range(6))
def test_graph_files_of_every_protocol_and_with_numpys_attributes(protocol, tmp_path):
    path = tmp_path / "g.pickle"
    for values in ((0, 2), (np.int64(0), np.int64(2)), ("Zone1", "Zone3"), (np.array(0), np.array([2]))):
        for graph in (attributed(values), networkx.MultiGraph(attributed(values))):
            path.write_bytes(pickle.dumps(graph, protocol))
            found = read_graph(path)
            assert found.zones.tolist() == [0, 2] and found.edges.tolist() == [[0], [1]]


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_graph_files_run_no_code_in_any_protocol(protocol, tmp_path):
    path, mark = tmp_path / "g.pickle", tmp_path / "ran"
    for evil in (
        Evil(mark.touch),
        Evil(eval, f"open({str(mark)!r}, 'w')"),
        Evil(copyreg._reconstructor, Evil, dict, {}),
    ):
        graph = networkx.Graph()
        graph.add_node(0, zoning_type=0, more=evil)
        path.write_bytes(pickle.dumps(graph, protocol))
        with pytest.raises(SkipError, match="graph file"):
            read_graph(path)
    assert not mark.exists()


def test_node_link_dicts_are_graphs_and_other_things_are_named():
    graph = attributed((0, 2))
    for name in ("edges", "links"):
        data = networkx.node_link_data(graph, edges=name)
        found = LayoutGraph.from_networkx(data)
        assert found.zones.tolist() == [0, 2] and found.edges.tolist() == [[0], [1]]
    for wrong, message in (
        ({}, "node-link dict"),
        ({"nodes": [{"zoning_type": 1}], "edges": []}, "node-link dict"),
        ({"nodes": [{"id": 0, "zoning_type": 1}], "edges": [{"source": 0, "target": 7, "connectivity": "door"}]}, "7"),
        (None, "got NoneType"),
        ("plan.pickle", "MSDFolder reads files"),
    ):
        with pytest.raises(SkipError, match=message):
            LayoutGraph.from_networkx(wrong)
