"""Variants: what a call of the denoiser says of itself, and one record for each kind of further pass of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from skipguide.blocks import BlockMap


@dataclass(frozen=True)
class Variant:
    """A call, or some rows of one, that does what a plain call does up to a block.

    Attributes:
        kind: what it is, in words.
        start: the first block at which it differs.
        common: paths of sublayers of that block that it still has in common with the plain call.
        left_out: blocks that the denoiser itself leaves out of it.
        sources: row -> the rows of the same batch that it may be a variant of; empty: the whole call is a variant of
            an earlier one.
        refusal: why it cannot be taken up from an earlier one although it is a variant; empty if it can.
    """

    kind: str
    start: int
    common: tuple[str, ...] = ()
    left_out: frozenset[int] = frozenset()
    sources: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    refusal: str = ""

    @property
    def place(self) -> Place:
        """Where it starts."""
        return Place(self.start, self.common)


@dataclass(frozen=True, order=True)
class Place:
    """Where a pass can be resumed.

    Attributes:
        layer: the block whose streams are kept.
        common: the sublayers of it whose results are kept.
    """

    layer: int
    common: tuple[str, ...] = ()


@dataclass(frozen=True)
class NativeKind:
    """One kind of further pass, and how it is known.

    Attributes:
        name: what it is.
        models: classes of the denoisers that can make it; empty is all.
        hooked: whether it is known by hooks of diffusers, so that it is not looked for where there are none.
        marks: arguments that make a call a variant, so that they are not compared with the plain call's.
        read: arguments by name, blocks -> what the call says of itself; None: it says nothing of this kind.
        foretell: pipeline, denoiser, blocks -> where the further passes of this step will start. It says what is
            worth keeping, no more: whether a pass is a variant is proven when it comes.
    """

    name: str
    read: Callable[[Mapping[str, Any], BlockMap], Variant | None]
    foretell: Callable[[Any, BlockMap], tuple[Place, ...]]
    models: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    hooked: bool = False

    def covers(self, blocks: BlockMap) -> bool:
        """Whether a denoiser can make such a pass."""
        return not self.models or any(cls.__name__ in self.models for cls in type(blocks.model).__mro__)
