"""The graph convolution of floor plans equals dense algebra, and counts many neighbours."""

import pytest
import torch
from helpers.dispatched import Dispatched
from hypothesis import given, settings
from hypothesis import strategies as st

from skipguide.vision import GraphConv


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
