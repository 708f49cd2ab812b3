"""Run: a pass of the model in which every operation on positions respects the masks.

The pass is watched with a `TorchFunctionMode`, so that what the model does between its modules (an add, a `cat`, a
mean) is seen as well as its layers. Each activation carries a `Spot`; each operation becomes an `Op`, is compared
with the plan if there is one, and is run as the plan says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from skipguide.arguments import sequence_like
from skipguide.errors import SkipError
from skipguide.vision.layer_masking.action import Action, prepare
from skipguide.vision.layer_masking.geometry import Op, Pointwise
from skipguide.vision.layer_masking.masks import Box, move, whole
from skipguide.vision.layer_masking.morphology import Morphology
from skipguide.vision.layer_masking.plan import Plan, Trace
from skipguide.vision.layer_masking.rules import apply_rule
from skipguide.vision.layer_masking.rules.names import name_of, where
from skipguide.vision.layer_masking.spot import TAG, Spot, laid, spot_of, tensors_in


class ChangedError(Exception):
    """The model did something else than in the pass that was traced."""


class MaskedRun(TorchFunctionMode):
    """One pass under masks.

    Args:
        keep: bool `[R, 1, H, W]`.
        how: "neighbours", "zeros" or "partial".
        plan: of this trace and these masks; None works the masks out on the way and records a trace.
        widest: the model's widest window.
        known: ids of the model's parameters and buffers.
    """

    def __init__(
        self, keep: Tensor, how: str, plan: Plan | None = None, widest: int = 1, known: frozenset[int] = frozenset()
    ) -> None:
        super().__init__()
        self.how, self.plan, self.widest, self.known = how, plan, widest, known
        self.ops: list[Op] = []
        self.masks: list[Tensor | None] = plan.masks if plan is not None else [keep]
        self.boxes: list[Box | None] = plan.boxes if plan is not None else [whole(keep)]
        self.shapes = plan.memory if plan is not None else Morphology()
        self.outputs: list[int] = []
        self.fixed = self.dynamic = ""
        self.rounds = 0
        self.largest = 0

    # -- around the pass ----------------------------------------------------------------------------------------

    def enter(self, images: Tensor) -> Tensor:
        """The first activation: hidden pixels are 0 from here on, whatever they held."""
        keep = self.mask(0)
        x = torch.where(keep, images, torch.zeros((), dtype=images.dtype, device=images.device))
        box = self.boxes[0]
        assert box is not None
        x = move(x, whole(keep), box)
        setattr(x, TAG, Spot(self, 0))
        return x

    def leave(self, output: Any) -> Any:
        """The model's answer; hidden positions that are still there are 0, and so is what was not computed."""
        if isinstance(output, Tensor):
            spot = spot_of(output)
            if spot is None:
                return output
            if spot.number is None:
                delattr(output, TAG)  # who keeps the answer keeps no run with its masks, and can pickle it
                return output
            self.outputs.append(spot.number)
            mask, box = self.mask(spot.number), self.boxes[spot.number]
            assert box is not None
            part = laid(self.shapes.part(mask, box, output.dtype), spot.dims, output.ndim)
            output = output * part
            if box == whole(mask):
                return output
            turned = output if spot.dims == (-2, -1) else output.movedim(spot.dims, (-2, -1))
            turned = move(turned, box, whole(mask))
            return turned if spot.dims == (-2, -1) else turned.movedim((-2, -1), spot.dims)
        if isinstance(output, Mapping):
            for key, value in list(output.items()):
                output[key] = self.leave(value)  # type: ignore[index]
            return output
        if isinstance(output, (list, tuple)):
            return sequence_like(output, (self.leave(value) for value in output))
        return output

    def trace(self) -> Trace:
        """What was recorded."""
        return Trace(tuple(self.ops), tuple(self.outputs), self.fixed, self.dynamic, self.widest)

    def mask(self, number: int) -> Tensor:
        """What is known of an activation."""
        mask = self.masks[number]
        assert mask is not None
        return mask

    # -- inside the pass ----------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See one operation."""
        kwargs = {} if kwargs is None else kwargs
        placed: list[Tensor] = []
        free = False
        for tensor in tensors_in((*args, *kwargs.values())):
            spot = getattr(tensor, TAG, None)
            if spot is not None and spot.run is self:
                if spot.number is None:
                    free = True
                else:
                    placed.append(tensor)
            elif self.plan is None and tensor.ndim >= 3 and id(tensor) not in self.known:
                self._unknown(func, tensor)
        if placed:
            return apply_rule(self, func, args, kwargs, placed)
        if free and not self.dynamic and self.plan is None:
            self._reads_values(func)
        out = func(*args, **kwargs)
        self.free(out)
        return out

    def free(self, out: Any) -> None:
        """Note that a result has no positions."""
        for tensor in (out,) if isinstance(out, Tensor) else tensors_in(out) if isinstance(out, (list, tuple)) else ():
            if id(tensor) not in self.known:
                setattr(tensor, TAG, Spot(self, None))

    def _unknown(self, func: Callable[..., Any], tensor: Tensor) -> None:
        if getattr(func, "__name__", "") in ("__get__", "size", "dim", "__set__", "__len__"):
            return
        raise SkipError(
            f"layer masking cannot follow the model: {name_of(func)}{where()} takes a tensor "
            f"{tuple(tensor.shape)} that no operation of torch made here (a custom autograd function, a compiled or "
            f"scripted part). Use the model without it"
        )

    def _reads_values(self, func: Callable[..., Any]) -> None:
        name = name_of(func)
        if name in ("bool", "item", "tolist", "nonzero", "numpy", "int", "float_", "unique", "index"):
            self.dynamic = f"its forward looks at values ({name})"

    def emit(self, op: Op, masks: list[Tensor] | None = None) -> Action:
        """Compare an operation with the plan, or work out its mask; how to run it."""
        number = len(self.ops)
        self.ops.append(op)
        if self.plan is not None:
            if number >= len(self.plan.trace.ops) or self.plan.trace.ops[number] != op:
                raise ChangedError
            self.rounds += max(self.plan.rounds[number], 0)
            return self.plan.actions[number]
        before = [self.mask(i) for i in op.inputs]
        mask = self.shapes.mask(op, before)
        self.masks.append(mask)
        self.boxes.append(None if mask is None else whole(mask))
        rounds = op.rounds if self.how == "neighbours" else 0
        self.rounds += rounds
        boxes = [self.boxes[i] for i in op.inputs]
        return prepare(op, before, mask, boxes, self.boxes[-1], rounds, torch.float32, self.how, self.shapes)

    def emit_rows(self, mask: Tensor, why: str) -> int:
        """A mask whose rows were taken from others: such a pass has no plan. The new activation's number."""
        if self.plan is not None:
            raise ChangedError
        self.dynamic = self.dynamic or why
        self.ops.append(Pointwise(why, ()))
        self.masks.append(mask)
        self.boxes.append(whole(mask))
        return len(self.masks) - 1

    def tag(self, out: Tensor, spot: Spot, **changes: Any) -> Tensor:
        """Mark a result as the activation that the last operation made."""
        fresh = Spot(self, len(self.ops), changes.get("dims", spot.dims), changes.get("positive", False))
        fresh.padded = changes.get("padded", False)
        if self.masks[len(self.ops)] is None:
            fresh.number = None
        setattr(out, TAG, fresh)
        if self.plan is None:
            self.largest = max(self.largest, out.numel() * out.element_size() // max(1, out.shape[0]))
        return out


__all__ = ["ChangedError", "MaskedRun"]
