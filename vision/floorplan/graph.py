"""Layout graphs: rooms with a zone, connections with a type, and the convolution over them."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from skipguide.config import LARGEST, is_one_of, native, number
from skipguide.errors import SkipError
from skipguide.vision.recording import is_recorded

EDGE_TYPES = ("door", "entrance", "passage")


@dataclass(frozen=True, eq=False)
class LayoutGraph:
    """The rooms of one plan and how they connect.

    Connections have no direction: each is kept once, whichever way round and how often it is given.

    Attributes:
        zones: `[R]`, the zone of each room, 0 and up.
        edges: `[2, E]`, pairs of rooms.
        edge_types: `[E]`, indices of `EDGE_TYPES`; doors by default.

    Raises:
        SkipError: without rooms, for a connection to a room that does not exist, numbers that are not whole, or shapes
            that do not match.

    Example:
        >>> graph = LayoutGraph([0, 1, 1], [[0, 1, 1], [1, 0, 2]], [0, 0, 2])
        >>> graph.edges.tolist(), graph.edge_types.tolist()
        ([[0, 1], [1, 2]], [0, 2])
    """

    zones: Tensor
    edges: Tensor = field(default_factory=lambda: torch.zeros(2, 0, dtype=torch.long))
    edge_types: Tensor | None = None

    def __post_init__(self) -> None:
        zones, edges = _whole(self.zones, "zones"), _whole(self.edges, "edges")
        if zones.ndim != 1 or len(zones) == 0:
            raise SkipError("a layout graph needs at least one room; got none: drop the plan or add a room")
        if edges.numel() == 0:
            edges = edges.reshape(2, 0)
        if edges.ndim != 2 or len(edges) != 2:
            raise SkipError(f"expected edges [2, E]; got {tuple(edges.shape)}")
        given = torch.zeros(edges.shape[1]) if self.edge_types is None else self.edge_types
        types = _whole(given, "edge types").reshape(-1)
        if len(types) != edges.shape[1]:
            raise SkipError(f"expected one type for each of {edges.shape[1]} edges; got {len(types)}")
        if edges.numel() and (int(edges.min()) < 0 or int(edges.max()) >= len(zones)):
            bad = sorted({int(e) for e in edges.flatten() if not 0 <= int(e) < len(zones)})
            raise SkipError(f"edges lead to rooms {bad}; the graph has rooms 0..{len(zones) - 1}")
        if int(zones.min()) < 0 or (types.numel() and int(types.min()) < 0):
            raise SkipError("zones and edge types count from 0; got a negative one")
        rows = torch.stack([edges.min(0).values, edges.max(0).values, types])[:, edges[0] != edges[1]]
        rows = torch.unique(rows, dim=1)
        object.__setattr__(self, "zones", zones)
        object.__setattr__(self, "edges", rows[:2])
        object.__setattr__(self, "edge_types", rows[2])

    def __len__(self) -> int:
        return len(self.zones)

    def without_edges(self) -> LayoutGraph:
        """The rooms alone; a control for what the connections tell."""
        return LayoutGraph(self.zones)

    @classmethod
    def from_networkx(cls, graph: Any, zone: str = "zoning_type", connection: str = "connectivity") -> Self:
        """Read a networkx graph, anything with its `nodes(data=True)` and `edges(data=True)`, or its node-link dict.

        Args:
            graph: rooms in any order and under any name; as a dict what `networkx.node_link_data` gives and JSON holds,
                `{"nodes": [{"id": ...}], "edges": [{"source": ..., "target": ...}]}` ("links" in older versions).
            zone: node attribute with the zone: a whole number, or a text that ends in one and counts from 1 ("Zone1").
            connection: edge attribute with one of `EDGE_TYPES`.

        Raises:
            SkipError: if an attribute is missing or unknown; a connection to a room that was never added shows as a
                room without a zone.
        """
        nodes, edges = _nodes_and_edges(graph)
        place = {name: at for at, (name, _) in enumerate(nodes)}
        zones, pairs, types = [], [], []
        for name, data in nodes:
            if data.get(zone) is None:
                raise SkipError(f"room {shown(name)} has no {zone!r}: was it only named by a connection?")
            zones.append(_zone(data[zone]))
        for one, other, data in edges:
            if missing := [end for end in (one, other) if end not in place]:
                raise SkipError(f"a connection leads to {shown(missing[0])}, which is no room of the graph")
            kind = data.get(connection)
            if not is_one_of(kind, EDGE_TYPES):
                ends = f"{shown(one)}-{shown(other)}"
                raise SkipError(f"expected {connection!r} out of {EDGE_TYPES} on {ends}; got {shown(kind)}")
            pairs.append((place[one], place[other]))
            types.append(EDGE_TYPES.index(kind))
        return cls(torch.tensor(zones), torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T, torch.tensor(types))

    def to_networkx(self, zone: str = "zoning_type", connection: str = "connectivity") -> Any:
        """As a networkx graph with the same attributes; a `MultiGraph` if two rooms connect in several ways.

        Raises:
            SkipError: for an edge type without a name in `EDGE_TYPES`.
        """
        import networkx

        assert self.edge_types is not None
        if self.edge_types.numel() and int(self.edge_types.max()) >= len(EDGE_TYPES):
            raise SkipError(f"expected edge types of {EDGE_TYPES}; got number {int(self.edge_types.max())}")
        several = torch.unique(self.edges, dim=1).shape[1] < self.edges.shape[1]
        graph = networkx.MultiGraph() if several else networkx.Graph()
        for room, value in enumerate(self.zones.tolist()):
            graph.add_node(room, **{zone: value})
        for (one, other), kind in zip(self.edges.T.tolist(), self.edge_types.tolist(), strict=True):
            graph.add_edge(one, other, **{connection: EDGE_TYPES[kind]})
        return graph


def shown(value: Any) -> str:
    """A value in an error: a file may hold one that is nested without end."""
    return reprlib.repr(value)


def _nodes_and_edges(graph: Any) -> tuple[list[tuple[Any, Any]], list[tuple[Any, Any, Any]]]:
    """Names and attributes of the rooms, and both ends and attributes of the connections."""
    if isinstance(graph, Mapping):
        rows: Any = graph.get("nodes")
        links: Any = graph.get("edges", graph.get("links"))
        try:
            nodes = [(row["id"], row) for row in rows]
            return nodes, [(link["source"], link["target"], link) for link in links]
        except (TypeError, KeyError) as error:
            raise SkipError(
                'expected a node-link dict, {"nodes": [{"id": ...}], "edges": [{"source": ..., "target": ...}]}; got '
                f"one with {sorted(map(str, graph))[:5]}: networkx.node_link_data writes it"
            ) from error
    if not (callable(getattr(graph, "nodes", None)) and callable(getattr(graph, "edges", None))):
        hint = "; skipguide.vision.floorplan.MSDFolder reads files" if isinstance(graph, str | Path) else ""
        raise SkipError(f"expected a networkx graph or its node-link dict; got {type(graph).__name__}{hint}")
    return list(graph.nodes(data=True)), list(graph.edges(data=True))


def _whole(values: Any, what: str) -> Tensor:
    """As int64; cutting off a fraction would name another room."""
    try:
        found = torch.as_tensor(values)
        if found.is_complex():
            raise TypeError
        whole = found.long()
    except (TypeError, ValueError, RuntimeError) as error:
        raise SkipError(f"expected {what} as whole numbers; got {shown(values)}") from error
    if found.dtype is torch.bool and found.numel():
        raise SkipError(f"expected {what} as whole numbers; got truths")
    if found.is_floating_point() and bool((whole != found).any()):
        raise SkipError(f"expected {what} as whole numbers; got {found.tolist()}")
    return whole


def _zone(value: Any) -> int:
    if isinstance(value, str):
        digits = value.lower().removeprefix("zone").strip()
        if not digits.isdecimal() or len(digits) > 9 or int(digits) < 1:
            raise SkipError(f"expected a zone as a number, or as 'Zone1' and up; got {shown(value)}")
        return int(digits) - 1
    if hasattr(value, "__array__"):  # of NumPy, with or without an axis; a list of one is no number
        array = native(value)
        value = array[0] if isinstance(array, list) and len(array) == 1 else array
    found = number(value)
    if found is None or int(found) != found or abs(found) > LARGEST:
        raise SkipError(f"expected a zone as a whole number; got {shown(value)}")
    return int(found)


@dataclass(frozen=True, eq=False)
class GraphBatch:
    """Several graphs as one, in the convention of PyTorch Geometric.

    Attributes:
        zones: `[R]` of all rooms.
        edge_index: `[2, 2E]`, from and to, both ways.
        edge_type: `[2E]`.
        batch: `[R]`, the plan of each room.
        size: number of plans.
    """

    zones: Tensor
    edge_index: Tensor
    edge_type: Tensor
    batch: Tensor
    size: int

    @classmethod
    def of(cls, graphs: Sequence[LayoutGraph]) -> GraphBatch:
        """Join graphs."""
        if not graphs:
            raise SkipError("expected at least one layout graph; got none")
        for graph in graphs:
            if not isinstance(graph, LayoutGraph):
                raise SkipError(
                    f"expected LayoutGraphs; got {type(graph).__name__} (LayoutGraph.from_networkx reads one)"
                )
        starts = torch.tensor([0, *(len(graph) for graph in graphs)]).cumsum(0)
        edges = torch.cat([g.edges + start for g, start in zip(graphs, starts, strict=False)], dim=1)
        types = torch.cat([g.edge_types for g in graphs if g.edge_types is not None])
        rows = [torch.full((len(graph),), at) for at, graph in enumerate(graphs)]
        return cls(
            torch.cat([graph.zones for graph in graphs]),
            torch.cat([edges, edges.flip(0)], dim=1),
            torch.cat([types, types]),
            torch.cat(rows),
            len(graphs),
        )

    def to(self, device: torch.device | str) -> GraphBatch:
        """The same on another device."""
        names = ("zones", "edge_index", "edge_type", "batch")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


# So that a batch is an input of an exported net, like a tensor.
torch.export.register_dataclass(GraphBatch)


class GraphConv(nn.Module):
    """Graph convolution with symmetric normalisation: `D^-1/2 (A + I) D^-1/2 X W + b` (Kipf and Welling, 2017).

    With edge types every type has its own W, and so does the loop of a room to itself; equal matrices give the plain
    form back.

    Args:
        inputs: features per node.
        outputs: features per node after.
        edge_types: number of types, or None for one W.

    Raises:
        SkipError: for an edge to a missing node, an edge type out of range, or other shapes.

    Example:
        >>> import torch
        >>> from skipguide.vision import GraphConv
        >>> conv = GraphConv(4, 8)
        >>> conv(torch.eye(4), torch.tensor([[0, 1], [1, 0]])).shape
        torch.Size([4, 8])
    """

    def __init__(self, inputs: int, outputs: int, edge_types: int | None = None) -> None:
        super().__init__()
        self.edge_types = edge_types
        self.weight = nn.Parameter(torch.empty(1 if edge_types is None else edge_types + 1, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        for matrix in self.weight:
            nn.init.xavier_uniform_(matrix)

    def forward(self, x: Tensor, edge_index: Tensor, edge_type: Tensor | None = None) -> Tensor:
        """Convolve.

        Args:
            x: `[R, inputs]`.
            edge_index: `[2, E]`, from and to; an undirected edge is given both ways. Loops are added here.
            edge_type: `[E]`; not used by a layer without types.

        Returns:
            `[R, outputs]`.
        """
        self._check(x, edge_index, edge_type)
        source, target = edge_index
        # In float32 at least: bfloat16 cannot count beyond 256 neighbours, nor add up their messages.
        wide = torch.promote_types(x.dtype, torch.float32)
        counts = (source != target).to(wide)  # 0 for loops; a mask as an index would wait for a GPU
        degree = torch.ones(x.shape[0], dtype=wide, device=x.device).index_add(0, target, counts)
        scale = degree.rsqrt()
        by_type = torch.einsum("rf,tfo->tro", x, self.weight)  # the last matrix is that of the loop
        kind = torch.zeros_like(source) if self.edge_types is None or edge_type is None else edge_type
        messages = (scale[source] * scale[target] * counts)[:, None] * by_type[kind, source]
        return (by_type[-1] / degree[:, None]).index_add(0, target, messages).to(x.dtype) + self.bias

    def _check(self, x: Any, edge_index: Any, edge_type: Any) -> None:
        inputs = self.weight.shape[1]
        for name, given in (("x", x), ("edge_index", edge_index), ("edge_type", edge_type)):
            if not isinstance(given, Tensor) and (name != "edge_type" or given is not None):
                raise SkipError(f"expected {name} as a tensor; got {type(given).__name__}")
        if x.ndim != 2 or x.shape[1] != inputs or x.shape[0] == 0:
            raise SkipError(f"expected node features [R, {inputs}] of at least one node; got {tuple(x.shape)}")
        if edge_index.ndim != 2 or len(edge_index) != 2 or edge_index.dtype != torch.long:
            raise SkipError(f"expected edge_index [2, E] of int64; got {edge_index.dtype} {tuple(edge_index.shape)}")
        low, high = (0, 0) if is_recorded() else _span(edge_index)
        if not 0 <= low <= high < x.shape[0]:
            raise SkipError(f"edge_index names nodes up to {high}, from {low} on; there are {len(x)}, counted from 0")
        if self.edge_types is None:
            return
        if edge_type is None or edge_type.shape != edge_index.shape[1:]:
            raise SkipError("this layer has edge types: pass edge_type, one for each edge")
        if edge_type.dtype not in (torch.long, torch.int32):
            raise SkipError(f"expected edge types as whole numbers; got {edge_type.dtype}")
        if is_recorded():
            return
        low, high = _span(edge_type)
        if not 0 <= low <= high < self.edge_types:
            raise SkipError(f"expected edge types 0..{self.edge_types - 1}; got {sorted(set(edge_type.tolist()))}")


def _span(numbers: Tensor) -> tuple[int, int]:
    """The least and the largest of whole numbers, in one transfer; zeros where there are none."""
    if not numbers.numel():
        return 0, 0
    low, high = torch.stack(numbers.aminmax()).tolist()
    return low, high
