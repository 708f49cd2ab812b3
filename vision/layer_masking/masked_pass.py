"""A pass of a model under masks: which activations it has made, the mask of each, and what is computed of them.

The rules (`rules/`) ask it about their inputs and report their results to it; `masking_mode` shows it the model's
operations one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from skipguide.arguments import sequence_like
from skipguide.vision.layer_masking.action import Action, prepare
from skipguide.vision.layer_masking.activation_info import TAG, ActivationInfo, in_layout, info_of
from skipguide.vision.layer_masking.geometry import Op, Pointwise
from skipguide.vision.layer_masking.mask_cache import MaskCache
from skipguide.vision.layer_masking.masks import Box, move, whole
from skipguide.vision.layer_masking.plan import Plan, Trace


class ChangedError(Exception):
    """The model did something else than in the pass that was traced."""


class MaskedPass:
    """One pass under masks.

    Args:
        keep: bool `[R, 1, H, W]`.
        how: "neighbours", "zeros" or "partial".
        plan: of this trace and these masks; None works the masks out on the way and records a trace.
        widest: the model's widest window.

    Attributes:
        ops: the operations so far; operation i makes activation i + 1.
        masks: of every activation; None where it has no positions.
        boxes: what is computed of every activation.
        outputs: the activations that the model returned.
        fixed: why no box can be cut out of the activations, or "".
        dynamic: why the operations may differ from call to call, or "".
        read: what of the values was read; a later operation may depend on it.
        rounds: rounds of fill so far.
        largest: bytes of one row of the largest activation.
    """

    def __init__(self, keep: Tensor, how: str, plan: Plan | None = None, widest: int = 1) -> None:
        self.how, self.plan, self.widest = how, plan, widest
        self.ops: list[Op] = []
        self.masks: list[Tensor | None] = plan.masks if plan is not None else [keep]
        self.boxes: list[Box | None] = plan.boxes if plan is not None else [whole(keep)]
        self.cache = plan.cache if plan is not None else MaskCache()
        self.outputs: list[int] = []
        self.fixed = self.dynamic = self.read = ""
        self.rounds = 0
        self.largest = 0

    def mask(self, number: int) -> Tensor:
        """The mask of an activation that has positions."""
        mask = self.masks[number]
        assert mask is not None
        return mask

    def trace(self) -> Trace:
        """What was recorded."""
        return Trace(tuple(self.ops), tuple(self.outputs), self.fixed, self.dynamic, self.widest)

    # -- the ends of the pass -----------------------------------------------------------------------------------

    def enter(self, images: Tensor) -> Tensor:
        """The first activation: hidden pixels are 0 from here on, whatever they held."""
        keep = self.mask(0)
        box = self.boxes[0]
        assert box is not None
        images, keep = move(images, whole(keep), box), move(keep, whole(keep), box)
        x = torch.where(keep, images, torch.zeros((), dtype=images.dtype, device=images.device))
        setattr(x, TAG, ActivationInfo(self, 0))
        return x

    def leave(self, output: Any) -> Any:
        """The model's answer; hidden positions that are still there are 0, and so is what was not computed."""
        if isinstance(output, Tensor):
            info = info_of(output)
            if info is None:
                return output
            if info.number is None:
                delattr(output, TAG)  # the answer then holds no reference to the masks, and can be pickled
                return output
            self.outputs.append(info.number)
            mask, box = self.mask(info.number), self.boxes[info.number]
            assert box is not None
            part = in_layout(self.cache.part(mask, box, output.dtype), info.dims, output.ndim)
            output = output * part
            if box == whole(mask):
                return output
            turned = output if info.dims == (-2, -1) else output.movedim(info.dims, (-2, -1))
            turned = move(turned, box, whole(mask))
            return turned if info.dims == (-2, -1) else turned.movedim((-2, -1), info.dims)
        if isinstance(output, Mapping):
            for key, value in list(output.items()):
                output[key] = self.leave(value)  # type: ignore[index]
            return output
        if isinstance(output, (list, tuple)):
            return sequence_like(output, (self.leave(value) for value in output))
        return output

    # -- what rules report --------------------------------------------------------------------------------------

    def record(self, op: Op) -> Action:
        """Note an operation: compare it with the plan, or work out its mask.

        Returns:
            How to run it.

        Raises:
            ChangedError: if the plan has another operation here.
        """
        number = len(self.ops)
        self.dynamic = self.dynamic or self.read
        self.ops.append(op)
        if self.plan is not None:
            if number >= len(self.plan.trace.ops) or self.plan.trace.ops[number] != op:
                raise ChangedError
            self.rounds += max(self.plan.rounds[number], 0)
            return self.plan.actions[number]
        before = [self.mask(i) for i in op.inputs]
        mask = self.cache.mask(op, before)
        self.masks.append(mask)
        self.boxes.append(None if mask is None else whole(mask))
        rounds = op.rounds if self.how == "neighbours" else 0
        self.rounds += rounds
        boxes = [self.boxes[i] for i in op.inputs]
        return prepare(op, before, mask, boxes, self.boxes[-1], rounds, torch.float32, self.how, self.cache)

    def record_rows(self, mask: Tensor, why: str) -> int:
        """Note an activation whose rows come from others. Which rows depends on data, so such a pass has no plan.

        Returns:
            The new activation's number.
        """
        if self.plan is not None:
            raise ChangedError
        self.dynamic = self.dynamic or why
        self.ops.append(Pointwise(why, ()))
        self.masks.append(mask)
        self.boxes.append(whole(mask))
        return len(self.masks) - 1

    def tag(self, out: Tensor, info: ActivationInfo, **changes: Any) -> Tensor:
        """Mark a result as the activation that the last operation made."""
        fresh = ActivationInfo(self, len(self.ops), changes.get("dims", info.dims), changes.get("positive", False))
        fresh.padded = changes.get("padded", False)
        if self.masks[len(self.ops)] is None:
            fresh.number = None
        setattr(out, TAG, fresh)
        if self.plan is None:
            self.largest = max(self.largest, out.numel() * out.element_size() // max(1, out.shape[0]))
        return out
