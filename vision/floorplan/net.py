"""FloorPlanNet: a U-Net on the structure image, with the layout graph at the bottleneck."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipguide.config import as_flag, as_number, as_whole, as_wholes, is_one_of
from skipguide.errors import SkipError
from skipguide.vision.floorplan.graph import EDGE_TYPES, GraphBatch, GraphConv, LayoutGraph
from skipguide.vision.floorplan.plan import CLASSES, ZONES
from skipguide.vision.pretrained import PretrainedMixin
from skipguide.vision.recording import is_recorded
from skipguide.vision.unet_grid import NodeValues, UNetGrid, check_images, resize


class FloorPlanNet(UNetGrid, PretrainedMixin, library_name="skipguide", license="apache-2.0"):
    """Structure image and layout graph in, a class per pixel out (arXiv 2309.13881, section 3).

    The image is injected again at every decoder step. The graph enters at the bottleneck: as a map of low resolution
    (the published layout, whose map has full resolution and takes 268 million weights), as one vector, or by attention
    from pixels to rooms.

    Args:
        encoder: None for plain convolution blocks, or a timm backbone with features at several strides.
        classes: classes per pixel.
        graph: "map", "attention", "vector", or None to see the image alone.
        in_channels: channels of the image.
        zones: zones a room can have.
        edge_types: types of connections; each has its own weights.
        widths: channels per level, finest first.
        depth: deepest level.
        skips: connections from the encoder; False is a control.
        reinject: the image at every decoder step.
        hidden: features per room after the first graph convolution.
        features: after the second.
        map_size: side of the map in pixels; it is stretched to the bottleneck.
        dropout: between the graph convolutions.
        pretrained: load timm's weights for the backbone.
        encoder_args: further arguments of `timm.create_model`.

    Raises:
        SkipError: for settings that do not go together.

    Example:
        >>> import torch
        >>> from skipguide.vision import FloorPlanNet, LayoutGraph
        >>> net = FloorPlanNet(widths=(4, 8, 12), graph="attention").eval()
        >>> graph = LayoutGraph([0, 1, 1], [[0, 1], [1, 2]])
        >>> net(torch.rand(1, 3, 30, 45), [graph]).shape
        torch.Size([1, 11, 30, 45])
    """

    def __init__(
        self,
        encoder: str | None = None,
        classes: int = len(CLASSES),
        graph: Literal["map", "attention", "vector"] | None = "map",
        *,
        in_channels: int = 3,
        zones: int = len(ZONES),
        edge_types: int = len(EDGE_TYPES),
        widths: Sequence[int] | None = None,
        depth: int | None = None,
        skips: bool = True,
        reinject: bool = True,
        hidden: int = 64,
        features: int = 256,
        map_size: int = 4,
        dropout: float = 0.5,
        pretrained: bool = False,
        encoder_args: dict[str, Any] | None = None,
    ) -> None:
        if graph is not None and not is_one_of(graph, ("map", "attention", "vector")):
            raise SkipError(f"expected graph 'map', 'attention', 'vector' or None; got {graph!r}")
        classes, zones, edge_types = as_wholes(classes=classes, zones=zones, edge_types=edge_types)
        hidden, features, map_size = as_wholes(hidden=hidden, features=features, map_size=map_size)
        reinject, in_channels = as_flag("reinject", reinject), as_whole("in_channels", in_channels)
        dropout = as_number("dropout", dropout)
        if dropout > 1:
            raise SkipError(f"expected dropout from 0 to 1; got {dropout}")
        super().__init__(
            encoder,
            in_channels,
            widths,
            depth,
            nested=False,
            skips=skips,
            inject=in_channels if reinject else 0,
            pretrained=pretrained,
            encoder_args=encoder_args,
        )
        self.classes, self.graph, self.zones, self.map_size = classes, graph, zones, map_size
        self.head = nn.Conv2d(self.widths[0], classes, 1)
        width = self.widths[-1]
        if graph is not None:
            self.rooms1 = GraphConv(zones, hidden, edge_types)
            self.rooms2 = GraphConv(hidden, features, edge_types)
            self.dropout = nn.Dropout(dropout)
        if graph in ("map", "vector"):
            channels = max(width // 4, 8)
            self.to_map = nn.Linear(features, channels * (map_size**2 if graph == "map" else 1))
            self.join = nn.Conv2d(width + channels, width, 1)
        elif graph == "attention":
            self.query = nn.Conv2d(width, features, 1)
            self.key = nn.Linear(features, features)
            self.value = nn.Linear(features, width)

    def forward(self, images: Tensor, graphs: GraphBatch | Sequence[LayoutGraph] | None = None) -> Tensor:
        """Draw plans.

        Args:
            images: finite floats `[N, in_channels, H, W]`, any H and W; see `preprocess` for the three channels.
            graphs: one per image.

        Returns:
            Logits `[N, classes, H, W]`.

        Raises:
            SkipError: for other shapes, NaN, another number of graphs, or zones and types the net does not know.
        """
        check_images(images, self.in_channels)
        if self.graph is None:
            if graphs is not None:
                raise SkipError(
                    "this net sees the image alone (graph=None): pass no graphs, or build it with graph='map'"
                )
            values = NodeValues(self, images)
        else:
            batch = self._batch(graphs, images)
            values = NodeValues(self, images, lambda bottom: self._condition(bottom, batch))
        values.reach(self.depth)
        return values.finish(self.head(values(0, self.depth)))

    def _batch(self, graphs: GraphBatch | Sequence[LayoutGraph] | None, images: Tensor) -> GraphBatch:
        if graphs is None:
            raise SkipError("expected one layout graph for each image; got none (graph=None builds a net without)")
        if isinstance(graphs, LayoutGraph):
            raise SkipError("expected a list with one layout graph for each image; got a graph alone: pass [graph]")
        batch = (graphs if isinstance(graphs, GraphBatch) else GraphBatch.of(list(graphs))).to(images.device)
        if batch.size != len(images):
            raise SkipError(f"expected one layout graph for each of {len(images)} images; got {batch.size}")
        if not is_recorded() and int(batch.zones.max()) >= self.zones:
            raise SkipError(f"expected zones 0..{self.zones - 1}; got {int(batch.zones.max())}")
        return batch

    def _condition(self, bottom: Tensor, batch: GraphBatch) -> Tensor:
        """The deepest features `[N, width, h, w]`, with the graph in them."""
        rooms = F.one_hot(batch.zones, self.zones).to(bottom.dtype)
        rooms = self.dropout(F.relu(self.rooms1(rooms, batch.edge_index, batch.edge_type)))
        rooms = self.rooms2(rooms, batch.edge_index, batch.edge_type)
        if self.graph == "attention":
            return bottom + self._attend(bottom, rooms, batch)
        count = rooms.new_zeros(batch.size).index_add(0, batch.batch, torch.ones_like(rooms[:, 0]))[:, None]
        pooled = rooms.new_zeros(batch.size, rooms.shape[1]).index_add(0, batch.batch, rooms) / count
        side = self.map_size if self.graph == "map" else 1
        drawn = self.to_map(pooled).view(batch.size, -1, side, side)
        size = bottom.shape[-2:]
        drawn = resize(drawn, size) if self.graph == "map" else drawn.expand(-1, -1, *size)
        return cast(Tensor, self.join(torch.cat([bottom, drawn], dim=1)))

    def _attend(self, bottom: Tensor, rooms: Tensor, batch: GraphBatch) -> Tensor:
        # Every pixel asks the rooms of its own plan.
        query = self.query(bottom).flatten(2).mT
        key, value = self.key(rooms), self.value(rooms)
        own = batch.batch == torch.arange(batch.size, device=bottom.device)[:, None]
        scores = (query @ key.T) / key.shape[1] ** 0.5
        share = scores.masked_fill(~own[:, None], float("-inf")).softmax(-1)
        return (share @ value).mT.reshape(bottom.shape)
