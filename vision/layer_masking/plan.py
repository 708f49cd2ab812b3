"""The plan of a pass: everything that follows from the masks alone, computed once for masks and a resolution.

Forwards through the operations: which positions are known after each. Backwards: which of them the answer reads,
because a residual add or a stride drops others. From both follow how many rounds of fill each operation needs (at most
k - 1 for a window of k; none where it reads nothing hidden), and the box of each activation that has to be computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from skipguide.vision.layer_masking.action import Action, filled_before, prepare
from skipguide.vision.layer_masking.geometry import Op, Pointwise, Window
from skipguide.vision.layer_masking.mask_cache import MaskCache
from skipguide.vision.layer_masking.masks import Box, grow, span, whole

ALIGNED = 4  # positions; matrix products on the CPU take an eighth longer where rows do not start at multiples of it
WORTH_ALIGNING = 1.025  # times the width at most
WORTH_CROPPING = 0.9  # of the positions at most; cutting costs copies


@dataclass(frozen=True)
class Trace:
    """The operations of a model on masked activations, in order; operation i makes activation i + 1.

    Attributes:
        ops: the operations.
        outputs: the activations that the model returns with their positions.
        fixed: why no box can be cut out of the activations, or "".
        dynamic: why the operations may differ from call to call, or "".
        widest: the model's widest window.
    """

    ops: tuple[Op, ...]
    outputs: tuple[int, ...] = ()
    fixed: str = ""
    dynamic: str = ""
    widest: int = 1


@dataclass
class Plan:
    """What the masks say about every operation of a trace.

    Attributes:
        trace: the operations.
        masks: what is known, per activation; None where positions are gone.
        boxes: what is computed, per activation.
        actions: how, per operation.
        rounds: rounds of fill, per operation.
        share: positions that are computed, of those of a plain pass (weighted by output positions of windows).
    """

    trace: Trace
    masks: list[Tensor | None]
    boxes: list[Box | None]
    actions: list[Action]
    rounds: list[int]
    share: float = 1.0
    cache: MaskCache = field(default_factory=MaskCache)


def make_plan(trace: Trace, keep: Tensor, dtype: torch.dtype, how: str = "neighbours", crop: bool = True) -> Plan:
    """Plan the pass.

    Args:
        trace: of the model at this resolution.
        keep: bool `[R, 1, H, W]`.
        dtype: of the activations.
        how: "neighbours", "zeros" or "partial".
        crop: compute boxes only.
    """
    cache = MaskCache()
    masks: list[Tensor | None] = [keep]
    for op in trace.ops:
        masks.append(cache.mask(op, [_known(masks, i) for i in op.inputs]))
    needs, reaches = _read_positions(trace, masks)
    rounds, boxes = _rounds_and_boxes(trace, masks, needs, reaches, cache, how)
    full = [None if m is None else whole(m) for m in masks]
    if not crop or trace.fixed:
        boxes = list(full)
    else:
        boxes = _computed_boxes(trace, boxes)
    share = _computed_share(trace, boxes, masks)
    if share > WORTH_CROPPING:
        boxes, share = list(full), 1.0
    plan = Plan(trace, masks, boxes, [], rounds, share, cache)
    for number, op in enumerate(trace.ops):
        plan.actions.append(
            prepare(
                op,
                [_known(masks, i) for i in op.inputs],
                masks[number + 1],
                [boxes[i] for i in op.inputs],
                boxes[number + 1],
                rounds[number],
                dtype,
                how,
                cache,
            )
        )
    return plan


def _known(masks: Sequence[Tensor | None], number: int) -> Tensor:
    mask = masks[number]
    assert mask is not None
    return mask


def _read_positions(trace: Trace, masks: list[Tensor | None]) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Per activation the known positions that are read; per operation all positions that it reads of its input."""
    needs: list[Tensor | None] = [None] * len(masks)
    reaches: list[Tensor | None] = [None] * len(trace.ops)
    for number in trace.outputs:
        needs[number] = masks[number]
    memo: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}
    # unions are kept with their two masks, because an id is only unique while its mask lives
    unions: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
    for number in reversed(range(len(trace.ops))):
        op, need = trace.ops[number], needs[number + 1]
        if need is None and masks[number + 1] is not None:
            continue  # it is not read
        for i in op.inputs:
            mask = _known(masks, i)
            if isinstance(op, Pointwise):
                assert need is not None
                reads = need
            else:
                # operations of a stage often have the same geometry and the same masks: computed once
                key = (op.kind_of, id(mask), id(need))
                if key not in memo:
                    reach = op.reach(need, mask)
                    memo[key] = (reach, _filled_from(op, reach, mask))
                reaches[number], reads = memo[key]
            before = needs[i]
            if before is None or before is reads:
                needs[i] = reads
                continue
            pair = (id(before), id(reads))
            if pair not in unions:  # once per pair: each comparison waits for a GPU
                both = before | reads
                unions[pair] = (before if torch.equal(before, both) else both, before, reads)
            needs[i] = unions[pair][0]
    return needs, reaches


def _filled_from(op: Op, reach: Tensor, mask: Tensor) -> Tensor:
    """The visible positions that are read, or that the fill of what is read takes means of."""
    if filled_before(op):
        return reach  # hidden ones too, because the padding before it has filled them
    if op.rounds:
        reach = reach | grow(reach > mask, op.rounds)
    return reach & mask


def _rounds_and_boxes(
    trace: Trace,
    masks: list[Tensor | None],
    needs: list[Tensor | None],
    reaches: list[Tensor | None],
    cache: MaskCache,
    how: str,
) -> tuple[list[int], list[Box | None]]:
    """Rounds and boxes as Python numbers, in one transfer, so that a GPU is waited for once.

    The rounds are -1 where nothing hidden is read.
    """
    flags: dict[tuple[int, int, int], Tensor] = {}
    wanted: list[list[tuple[int, int, int]]] = []
    for op, reach in zip(trace.ops, reaches, strict=True):
        keys: list[tuple[int, int, int]] = []
        if reach is not None:
            mask = _known(masks, op.inputs[0])
            steps = op.rounds if how == "neighbours" else 0
            for step, known in enumerate(cache.rings(mask, max(steps - 1, 0))):
                key = (id(reach), id(mask), step)
                keys.append(key)
                if key not in flags:
                    flags[key] = (reach > known).any()
        wanted.append(keys)
    lines: dict[int, tuple[Tensor, Tensor]] = {}
    for need in needs:
        if need is not None and id(need) not in lines:
            flat = need.amax((0, 1))
            lines[id(need)] = (flat.amax(1), flat.amax(0))
    asked = [f.float().view(1) for f in flags.values()] + [line for pair in lines.values() for line in pair]
    answers = torch.cat(asked).cpu().split([len(a) for a in asked]) if asked else ()
    truth = {key: bool(a) for key, a in zip(flags, answers, strict=False)}
    spans = iter(answers[len(flags) :])
    boxes = {key: (*span(next(spans)), *span(next(spans))) for key in lines}
    rounds = []
    for op, keys in zip(trace.ops, wanted, strict=True):
        open_ = [truth[key] for key in keys]
        steps = op.rounds if how == "neighbours" else 0
        if not keys or not open_[0]:
            rounds.append(-1)
        else:
            rounds.append(next((step for step, missing in enumerate(open_) if not missing), steps))
    found: list[Box | None] = []
    for seen, need in zip(masks, needs, strict=True):
        found.append(None if seen is None else whole(seen) if need is None else aligned(boxes[id(need)], whole(seen)))
    return rounds, found


def aligned(box: Box, bounds: Box) -> Box:
    """The box, widened to a multiple of `ALIGNED` positions if that takes little; else the box itself.

    Example:
        >>> aligned((7, 50, 7, 50), (0, 56, 0, 56)), aligned((2, 13, 2, 13), (0, 14, 0, 14))
        ((7, 50, 7, 51), (2, 13, 2, 13))
    """
    top, bottom, left, right = box
    height, width = bottom - top, right - left
    wide = next((w for w in range(width, width + ALIGNED) if height * w % ALIGNED == 0), width)
    if wide == width or wide > WORTH_ALIGNING * width or wide > bounds[3] - bounds[2]:
        return box
    right = min(left + wide, bounds[3])
    return top, bottom, right - wide, right


def _computed_boxes(trace: Trace, wanted: list[Box | None]) -> list[Box | None]:
    """The box of each activation: a window makes the wanted one, other operations what their inputs have in common."""
    boxes: list[Box | None] = [wanted[0]]
    for number, op in enumerate(trace.ops):
        if wanted[number + 1] is None or not isinstance(op, Pointwise):
            boxes.append(wanted[number + 1])
            continue
        inputs = [boxes[i] for i in op.inputs]
        tops, bottoms, lefts, rights = zip(*(box for box in inputs if box is not None), strict=True)
        boxes.append((max(tops), min(bottoms), max(lefts), min(rights)))
    return boxes


def _computed_share(trace: Trace, boxes: list[Box | None], masks: list[Tensor | None]) -> float:
    done = total = 0
    for number, op in enumerate(trace.ops):
        box, mask = boxes[number + 1], masks[number + 1]
        if isinstance(op, Window) and op.kind == "conv" and box is not None and mask is not None:
            done += (box[1] - box[0]) * (box[3] - box[2])
            total += mask.shape[-2] * mask.shape[-1]
    return done / total if total else 1.0
