"""Grid: frames, height and width of the tokens of the running pass, from how the model was called."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from skipguide.arguments import Arguments
from skipguide.blocks import Block
from skipguide.errors import SkipError
from skipguide.hosts.wrappers import unwrap
from skipguide.spec import TokenGrid

Grid = tuple[int, int, int]


class GridReader:
    """Reads where the tokens of a model's first stream lie.

    Args:
        spec: how a call says it.
        model: the model, whose config has the patch sizes.
    """

    __slots__ = ("arguments", "name", "patch", "spec")

    def __init__(self, spec: TokenGrid, model: nn.Module) -> None:
        self.spec = spec
        self.arguments = Arguments(model)
        self.name = type(unwrap(model)).__name__
        self.patch = _patch(spec, model)

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Grid:
        """Frames, height and width, in tokens.

        Raises:
            SkipError: if this call does not say them.
        """
        layout = self.spec.layout
        given = {name: self.arguments.get(name, args, kwargs) for name in ("num_frames", "height", "width")}
        value = self.arguments.get(self.spec.argument, args, kwargs)
        if layout == "sizes":
            if all(isinstance(size, int) for size in given.values()):
                return given["num_frames"], given["height"], given["width"]
        elif layout == "places":
            if isinstance(value, Tensor) and value.shape[-1] >= 3:
                places = value.reshape(-1, value.shape[-1])[:, :3]
                lengths: list[float] = (places.amax(0) - places.amin(0) + 1).tolist()
                frames, height, width = (round(length) for length in lengths)
                return frames, height, width
        elif layout == "shapes":
            first: Any = value[0] if value else None
            first = first[0] if first and isinstance(first[0], (list, tuple)) else first
            if first and len(first) == 3:
                return int(first[0]), int(first[1]), int(first[2])
        elif isinstance(value, Tensor) and value.dim() == len(layout):
            sizes = [value.shape[layout.index(axis)] if axis in layout else 1 for axis in "fhw"]
            frames, height, width = (size // patch for size, patch in zip(sizes, self.patch, strict=True))
            return frames, height, width
        raise SkipError(
            f"this call of {self.name} does not say where its tokens lie: expected {self.spec.argument} as "
            f"{layout!r}, which a plan needs that goes by places in the picture. Use another part"
        )


class BlockGrid:
    """The grid that the tokens of one block's rows lie on.

    Args:
        block: the block; its axes say which of the model's it has.
        part: for errors.
    """

    __slots__ = ("axes", "halved", "name", "part")

    def __init__(self, block: Block, part: str) -> None:
        self.axes = block.spec.axes
        self.name = block.name
        self.part = part
        spec = block.model_spec
        self.halved = bool(spec is not None and spec.grid is not None and spec.grid.halved)

    def of(self, full: Grid | None, tokens: int) -> Grid:
        """Frames, height and width of this block's tokens.

        Raises:
            SkipError: if there are others among them, such as those of a reference picture.
        """
        if full is None:
            raise SkipError(f"part={self.part!r} needs the grid of the tokens, and {self.name} runs outside the model")
        frames, height, width = full
        if self.axes == "t":
            height = width = 1
        elif self.axes == "hw":
            frames = 1
        while self.halved and frames * height * width > tokens and height * width > 1:
            height, width = (height + 1) // 2, (width + 1) // 2
        if frames * height * width != tokens:
            raise SkipError(
                f"part={self.part!r} expected {frames} x {height} x {width} tokens (frames, height, width) in "
                f"{self.name}; got {tokens}: there are others among them, such as a reference picture's. Use "
                f"part='attn_identity' or 'block'"
            )
        return frames, height, width


def _patch(spec: TokenGrid, model: nn.Module) -> Grid:
    config: Any = getattr(unwrap(model), "config", None)
    found: list[int] = []
    for field in spec.patch:
        value = getattr(config, field, None) or 1
        found += list(value) if isinstance(value, (list, tuple)) else [int(value)]
    if spec.patch and len(found) > 3:  # one field has all three
        found = found[-3:]
    if len(found) == 2:  # of the frames, and of a frame's sides
        found.append(found[-1])
    frames, height, width = found if len(found) == 3 else (1, 1, 1)
    return frames, height, width
