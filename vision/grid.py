"""Grid: encoder levels and decoder nodes that are evaluated on demand; the trunk of UNet++ and of the floor plan net.

Node (i, j) lies at level i (0 is the finest) and column j. Column 0 is the encoder; a later node reads what lies left
of it at its level and the node below. Nothing runs that the wanted node does not need.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipguide.config import as_flag, as_list, as_whole
from skipguide.errors import SkipError

Node = tuple[int, int]


def check_images(images: Any, channels: int) -> None:
    """Refuse what is not a finite float tensor `[N, channels, H, W]`."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != channels or 0 in images.shape:
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise SkipError(f"expected images [N, {channels}, H, W]; got {got}")
    if not images.is_floating_point():
        raise SkipError(f"expected images as floats; got {images.dtype}: convert and normalise them first")
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(images).all()):
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
        """Run the block."""
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))


class TimmLevels(nn.Module):
    """A timm backbone as levels of distinct stride, that stops where it is told to.

    Args:
        name: a timm model.
        in_channels: channels of the images.
        depth: deepest level to keep; deeper weights are dropped. None keeps all.
        pretrained: load timm's weights.
        arguments: passed to `timm.create_model`.

    Raises:
        SkipError: for an unknown name, a backbone without intermediate features, or one whose features all have one
            stride (a plain ViT).
    """

    def __init__(
        self, name: str, in_channels: int, depth: int | None, pretrained: bool, arguments: dict[str, Any]
    ) -> None:
        super().__init__()
        import timm

        # Models with a window or a position table check the image size; some let themselves be talked out of it.
        options = {"features_only": True, "feature_cls": "getter", "in_chans": in_channels, "pretrained": pretrained}
        flexible = True
        try:
            try:
                model = timm.create_model(name, **options, strict_img_size=False, **arguments)
            except TypeError:
                flexible = False
                model = timm.create_model(name, **options, **arguments)
        except (RuntimeError, TypeError, AttributeError, AssertionError) as error:
            raise SkipError(
                f"timm has no usable features for {name!r}: {error}; pick one of timm.list_models(), one with "
                "forward_intermediates"
            ) from error
        body = model.model
        if not hasattr(body, "forward_intermediates"):
            raise SkipError(f"{name} has no forward_intermediates and cannot stop early; choose another backbone")
        strides = [int(r) for r in model.feature_info.reduction()]
        channels = model.feature_info.channels()
        last = {stride: at for at, stride in enumerate(strides)}  # of several features with one stride, the last
        levels = [last[stride] for stride in sorted(last)]
        if len(levels) < 2:
            raise SkipError(
                f"the features of {name} all have stride {strides[0]}: a grid needs levels of falling resolution; "
                "choose a backbone with stages (resnet, convnext, swin, pvt_v2, ...)"
            )
        if depth is not None:
            levels = levels[: depth + 1]
        self.strides = [strides[at] for at in levels]
        self.channels = [channels[at] for at in levels]
        self.indices = [int(model.out_indices[at]) for at in levels]
        if depth is not None:
            body.prune_intermediate_layers(self.indices, prune_norm=True)
        self.name = name
        self.model = body
        config = getattr(body, "pretrained_cfg", None) or {}
        self.multiple = math.lcm(*strides)  # of all levels, so that a pruned model pads as the full one does
        if config.get("fixed_input_size") and not flexible:
            self.multiple = math.lcm(self.multiple, int(arguments.get("img_size", config["input_size"][-1])))

    def forward(self, images: Tensor, level: int) -> list[Tensor]:
        """Features `[N, channels, h, w]` of levels 0 to `level`; what lies deeper does not run."""
        indices = self.indices[: level + 1]
        try:
            return cast(
                "list[Tensor]",
                self.model.forward_intermediates(
                    images, indices=indices, stop_early=True, output_fmt="NCHW", intermediates_only=True
                ),
            )
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError) as error:
            height, width = images.shape[-2:]
            raise SkipError(
                f"the backbone {self.name} cannot take images of {height}x{width} pixels: {error}"
            ) from error


class SkipGrid(nn.Module):
    """Encoder and decoder nodes; a subclass adds the heads.

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
        self.encoder: TimmLevels | None = None
        self.stem: ConvBlock | None = None
        if encoder is None:
            if encoder_args or pretrained or full_resolution:
                raise SkipError("pretrained, full_resolution and encoder_args belong to a timm encoder; pass encoder=")
            widths = list(widths or (32, 64, 128, 256, 512))
            depth = len(widths) - 1 if depth is None else depth
            sources: list[int] = [in_channels, *widths]
        else:
            below = None if depth is None else depth - int(full_resolution)
            self.encoder = TimmLevels(encoder, in_channels, below, pretrained, dict(encoder_args or {}))
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


class Walk:
    """The values of one batch, node by node, as they are asked for.

    Args:
        grid: the nodes.
        images: `[N, C, H, W]`; padded to what a timm backbone can take.
        tap: changes the deepest encoder node before anything reads it.

    Attributes:
        values: what has been computed, `[rows, width, h, w]` per node.
        rows_run: how many rows each node ran, over the whole walk.
    """

    def __init__(self, grid: SkipGrid, images: Tensor, tap: Callable[[Tensor], Tensor] | None = None) -> None:
        self.grid, self.tap = grid, tap
        self.size = tuple(images.shape[-2:])
        if grid.encoder is not None:
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
            self.rows_run[i, j] = self.rows_run.get((i, j), 0) + len(value)
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
