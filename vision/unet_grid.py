"""A U-Net as a grid of nodes that are evaluated on demand: the trunk of UNet++ and of the floor plan net.

Node (i, j) lies at level i (0 is the finest) and column j. Column 0 is the encoder. A later node reads the nodes left
of it at its level, and the node one level deeper in the column before. Only the nodes that a wanted node needs are run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipguide.config import as_flag, as_list, as_whole
from skipguide.errors import SkipError
from skipguide.vision.recording import is_recorded, is_traced
from skipguide.vision.timm_encoder import TimmEncoder

Node = tuple[int, int]


def check_images(images: Any, channels: int) -> None:
    """Refuse what is not a finite float tensor `[N, channels, H, W]`."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != channels or 0 in images.shape:
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise SkipError(f"expected images [N, {channels}, H, W]; got {got}")
    if not images.is_floating_point():
        raise SkipError(f"expected images as floats; got {images.dtype}: convert and normalise them first")
    if not is_recorded() and not bool(torch.isfinite(images).all()):
        raise SkipError("expected finite images; got NaN or infinity: clean or drop those pixels first")


def resize(values: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, with aligned corners; the identity at equal size."""
    if tuple(values.shape[-2:]) == tuple(size):
        return values
    return F.interpolate(values, size=tuple(size), mode="bilinear", align_corners=True)


class ConvBlock(nn.Module):
    """Two 3x3 convolutions, each with batch norm and ReLU: `[N, inputs, H, W]` to `[N, outputs, H, W]`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block.

        Raises:
            SkipError: in training, for one value per channel, which has no variance.
        """
        if self.bn1.training and x.shape[0] == x.shape[2] == x.shape[3] == 1:
            raise SkipError(
                "batch norm in training needs more than one value per channel, and one image that shrank to 1x1 pixels "
                "has one: give more images a batch, larger images, or call model.eval()"
            )
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))


class UNetGrid(nn.Module):
    """The nodes of encoder and decoder; a subclass adds the heads.

    Args:
        encoder: None for plain convolution blocks with max pooling, or the name of a timm backbone.
        in_channels: channels of the images.
        widths: channels per level, finest first.
        depth: deepest level.
        nested: True builds all nodes (i, j) with i + j <= depth; False the two arms of a plain U-Net.
        skips: False cuts the connections from the encoder.
        inject: channels that every decoder node gets besides (an image re-injected at its size).
        full_resolution: put a convolution block on the image itself in front of a timm backbone.
        pretrained: load timm's weights.
        encoder_args: passed to `timm.create_model`.
    """

    def __init__(
        self,
        encoder: str | None,
        in_channels: int,
        widths: Sequence[int] | None,
        depth: int | None,
        *,
        nested: bool = True,
        skips: bool = True,
        inject: int = 0,
        full_resolution: bool = False,
        pretrained: bool = False,
        encoder_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if encoder is not None and not isinstance(encoder, str):
            raise SkipError(f"expected encoder as None or the name of a timm backbone; got {type(encoder).__name__}")
        in_channels = as_whole("in_channels", in_channels)
        depth = None if depth is None else as_whole("depth", depth)
        if widths is not None:
            widths = as_list("widths", widths)
        nested, skips = as_flag("nested", nested), as_flag("skips", skips)
        full_resolution, pretrained = as_flag("full_resolution", full_resolution), as_flag("pretrained", pretrained)
        self.in_channels, self.nested, self.skips, self.inject = in_channels, nested, skips, inject
        self.encoder: TimmEncoder | None = None
        self.stem: ConvBlock | None = None
        if encoder is None:
            if encoder_args or pretrained or full_resolution:
                raise SkipError("pretrained, full_resolution and encoder_args belong to a timm encoder; pass encoder=")
            widths = list(widths or (32, 64, 128, 256, 512))
            depth = len(widths) - 1 if depth is None else depth
            sources: list[int] = [in_channels, *widths]
        else:
            below = None if depth is None else depth - int(full_resolution)
            self.encoder = TimmEncoder(encoder, in_channels, below, pretrained, encoder_args or {})
            sources = list(self.encoder.channels)
            strides = ([1] if full_resolution else []) + self.encoder.strides
            if full_resolution and self.encoder.strides[0] == 1:
                raise SkipError(f"{encoder} has a level at full resolution already; drop full_resolution=True")
            widths = list(widths or [min(256, max(16, 16 * stride)) for stride in strides])
            if full_resolution:
                self.stem = ConvBlock(in_channels, widths[0])
            depth = len(strides) - 1 if depth is None else depth
            if depth > len(strides) - 1:
                raise SkipError(f"{encoder} has {len(strides)} levels; expected a depth up to {len(strides) - 1}")
        if len(widths) < depth + 1 or depth < 1:
            raise SkipError(f"a grid of depth {depth} needs {depth + 1} widths (at least 2); got {widths}")
        self.widths, self.depth = widths[: depth + 1], depth
        first: list[nn.Module] = []
        for level in range(depth + 1):
            if self.encoder is None:
                first.append(ConvBlock(sources[level], widths[level]))
            elif self.stem is not None:
                lateral = nn.Conv2d(sources[level - 1], widths[level], 1) if level else nn.Identity()
                first.append(lateral)
            else:
                first.append(nn.Conv2d(sources[level], widths[level], 1))
        # Keys read node.<level>.<column>.
        self.node = nn.ModuleDict({str(i): nn.ModuleDict({"0": block}) for i, block in enumerate(first)})
        for i, j in self.nodes():
            if j:
                left = (j if nested else 1) * widths[i] if skips else 0
                cast(nn.ModuleDict, self.node[str(i)])[str(j)] = ConvBlock(left + widths[i + 1] + inject, widths[i])

    def nodes(self, level: int | None = None) -> list[Node]:
        """The nodes that head `level` needs (default: the deepest), column by column."""
        level = self.depth if level is None else level
        if not self.nested:
            return [(i, 0) for i in range(level + 1)] + [(level - j, j) for j in range(1, level + 1)]
        return [(i, j) for j in range(level + 1) for i in range(level + 1 - j)]

    def node_at(self, i: int, j: int) -> nn.Module:
        """The block of one node."""
        return cast(nn.ModuleDict, self.node[str(i)])[str(j)]


class NodeValues:
    """The nodes' values for one batch, each computed when it is first asked for.

    Args:
        grid: the nodes.
        images: `[N, C, H, W]`; padded to what a timm backbone can take.
        tap: changes the deepest encoder node before anything reads it.

    Attributes:
        values: what has been computed, `[rows, width, h, w]` per node.
        rows_run: how many rows each node ran, in all.
    """

    def __init__(self, grid: UNetGrid, images: Tensor, tap: Callable[[Tensor], Tensor] | None = None) -> None:
        self.grid, self.tap = grid, tap
        self.size = tuple(images.shape[-2:])
        if grid.encoder is not None:
            if is_traced():
                raise SkipError(
                    f"a trace keeps the size of its example, to which {grid.encoder.name} pads and reshapes, and would "
                    "be wrong for another: use torch.export.export, which refuses other sizes"
                )
            pad = [-side % grid.encoder.multiple for side in self.size]
            if any(pad):
                images = F.pad(images, (0, pad[1], 0, pad[0]), mode="replicate")
        self.images = images
        self.features: list[Tensor] = []
        self.values: dict[Node, Tensor] = {}
        self.rows_run: dict[Node, int] = {}

    def reach(self, level: int) -> None:
        """Run a timm encoder down to `level`, at once; it cannot go on from where it stopped."""
        grid = self.grid
        if grid.encoder is not None and level >= len(self.features):
            below = grid.encoder(self.images, level - (grid.stem is not None))
            self.features = below if grid.stem is None else [grid.stem(self.images), *below]

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows only (a boolean tensor)."""
        self.images = self.images[rows]
        self.features = [feature[rows] for feature in self.features]
        self.values = {node: value[rows] for node, value in self.values.items()}

    def __call__(self, i: int, j: int) -> Tensor:
        """The value of a node; computes what it needs and nothing else."""
        if (i, j) not in self.values:
            value = self._first(i) if j == 0 else self._inner(i, j)
            self.values[i, j] = value
            self.rows_run[i, j] = self.rows_run.get((i, j), 0) + value.shape[0]
        return self.values[i, j]

    def _first(self, i: int) -> Tensor:
        block = self.grid.node_at(i, 0)
        if self.grid.encoder is None:
            # ceil_mode changes nothing at even sizes, and an odd or one-pixel side stays legal.
            value = block(self.images if i == 0 else F.max_pool2d(self(i - 1, 0), 2, ceil_mode=True))
        else:
            self.reach(i)
            value = block(self.features[i])
        return self.tap(value) if self.tap is not None and i == self.grid.depth else value

    def _inner(self, i: int, j: int) -> Tensor:
        below = self(i + 1, j - 1)
        if self.grid.nested:
            left = [self(i, column) for column in range(j)]
        else:
            left = [self(i, 0)]
        size = left[0].shape[-2:]
        parts = [*(left if self.grid.skips else []), resize(below, size)]
        if self.grid.inject:
            parts.append(F.interpolate(self.images, size=tuple(size), mode="nearest"))
        return cast(Tensor, self.grid.node_at(i, j)(torch.cat(parts, dim=1)))

    def finish(self, values: Tensor) -> Tensor:
        """Bring a head's output to the size of the images that came in."""
        return resize(values, self.images.shape[-2:])[..., : self.size[0], : self.size[1]]
