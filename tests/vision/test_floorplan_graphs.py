"""Layout graphs: through networkx and back, joined to a batch, and refused where they are none."""

import networkx
import pytest
import torch
from helpers.layout_graphs import PAIR, TRIANGLE

from skipguide.errors import SkipError
from skipguide.vision import GraphConv
from skipguide.vision.floorplan import GraphBatch, LayoutGraph


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
