"""What was computed from masks, kept so that operations on the same masks share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from skipguide.vision.layer_masking.fill import fill_weights
from skipguide.vision.layer_masking.geometry import Op, Pointwise, Window
from skipguide.vision.layer_masking.masks import Box, grow, move, rectangle_of, whole


@dataclass
class MaskCache:
    """Answers that depend on masks alone. Keys hold the ids of masks, hence `kept` holds the masks.

    Attributes:
        memo: the masks after operations.
        wider: pairs of ids: the first mask is contained in the second.
        lists: rings of fill, fill weights and parts of masks.
        actions: how operations are run.
        rectangles: the visible rectangle of a mask, or None.
        kept: the masks whose ids are in use.
    """

    memo: dict[tuple[object, ...], Tensor | None] = field(default_factory=dict)
    wider: set[tuple[int, int]] = field(default_factory=set)
    lists: dict[tuple[object, ...], list[Tensor]] = field(default_factory=dict)
    actions: dict[tuple[object, ...], Any] = field(default_factory=dict)
    rectangles: dict[int, Box | None] = field(default_factory=dict)
    kept: list[object] = field(default_factory=list)

    def mask(self, op: Op, masks: Sequence[Tensor]) -> Tensor | None:
        """`op.mask(masks)`, computed once for operations of one kind."""
        first = masks[0]
        if isinstance(op, Pointwise) and all(mask is first for mask in masks):
            return first
        ids = tuple(dict.fromkeys(id(mask) for mask in masks))
        if len(ids) > 1:  # a mask that another is contained in does not change their intersection
            masks = [m for m in masks if not any(other != id(m) and (other, id(m)) in self.wider for other in ids)]
            masks = list({id(m): m for m in masks}.values())
        if isinstance(op, Pointwise) and len({id(m) for m in masks}) == 1:
            return masks[0]
        key = (*(id(m) for m in masks), op.kind_of)
        if key not in self.memo:
            self.memo[key] = after = op.mask(masks)
            self.kept += [*masks, after]
            if isinstance(op, Window) and after is not None and op.stride == (1, 1):
                top, _, left, _ = op.padding
                ky, kx = op.span
                # every window holds its own position, so the mask only grows
                if (
                    after.shape[-2:] == masks[0].shape[-2:]
                    and 0 <= top < ky
                    and 0 <= left < kx
                    and op.dilation == (1, 1)
                ):
                    self.wider |= {(id(masks[0]), id(after))}
                    self.wider |= {(a, id(after)) for a, b in self.wider if b == id(masks[0])}
            if isinstance(op, Pointwise) and after is not None:
                self.wider |= {(id(after), id(m)) for m in masks}
        return self.memo[key]

    def rings(self, mask: Tensor, rounds: int) -> list[Tensor]:
        """The mask after 0, 1, ... `rounds` rounds of fill."""
        have = self.lists.setdefault(("rings", id(mask)), [mask])
        while len(have) <= rounds:
            have.append(grow(have[-1]))
        return have[: rounds + 1]

    def weights(self, mask: Tensor, rounds: int, region: Box, dtype: torch.dtype) -> list[Tensor]:
        """The fill's weights on a region, 0 outside of the map."""
        key = ("weights", id(mask), rounds, region, dtype)
        if key not in self.lists:
            base = self.lists.get(("weights", id(mask)), [])
            if len(base) < rounds:
                base = self.lists["weights", id(mask)] = fill_weights(mask, rounds)
            self.lists[key] = [move(w, whole(mask), region).to(dtype).contiguous() for w in base[:rounds]]
            self.kept.append(mask)
        return self.lists[key]

    def part(self, mask: Tensor, region: Box, dtype: torch.dtype) -> Tensor:
        """The mask on a region, 0 outside of the map."""
        key = ("part", id(mask), region, dtype)
        if key not in self.lists:
            self.lists[key] = [move(mask, whole(mask), region).to(dtype).contiguous()]
            self.kept.append(mask)
        return self.lists[key][0]

    def rectangle(self, mask: Tensor) -> Box | None:
        """The visible positions if they are one rectangle, in all rows; None on a GPU, which would be waited for."""
        if mask.is_cuda:
            return None
        if id(mask) not in self.rectangles:
            self.rectangles[id(mask)] = rectangle_of(mask)
            self.kept.append(mask)
        return self.rectangles[id(mask)]
