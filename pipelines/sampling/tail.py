"""Tail: from the first skipped block on, the skipped rows run in a pass of their own, or in a batch with the others.

Both do the same work. One batch uses a GPU better where a pass is too short to fill it, and needs memory for the
further rows; a pass of its own needs that of one activation. The batch is made of the rows that the pipeline asks for
and, per skipped pass, a copy of those rows that it is a variant of. A block before the first skipped one runs for the
pipeline's rows only, and the copies get what their originals got; from there on every block runs for all rows, except
that a skipped block passes the copies by. The model itself makes everything else (time embeddings, masks, what is
between blocks, the head) for the whole batch, so that nothing has to be known of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from skipguide.errors import SkipError
from skipguide.hosts.wrappers import unwrap
from skipguide.pipelines.sampling.shared_prefixes import PLAIN, SharedPass
from skipguide.plan import SkipPlan

Tail = Literal["separate", "batched", "auto"]
TAILS = get_args(Tail)

# tail="auto" takes one batch up to so many tokens (of the video or image) times rows. On the CPU as measured in
# demos/benchmarks/stg_tail.md; for CUDA an estimate, from where matrix products fill a GPU; elsewhere never.
AUTO = {"cuda": 4096, "cpu": 512}


def sources(shared: Sequence[SharedPass], rows: slice, batch: int, blocks: int) -> dict[int, tuple[int, ...]]:
    """Block -> for each row of the wide batch, the row that it has the result of; without blocks that all rows run.

    Args:
        shared: the skipped passes, each from the earlier one that it shares its beginning with.
        rows: the pipeline's rows that they are variants of.
        batch: how many rows the pipeline asks for.
        blocks: how many blocks the model has.

    Example:
        >>> shared = [SharedPass(SkipPlan([2]), parent=PLAIN, start=2, blocks=1)]
        >>> sources(shared, slice(1, 2), batch=2, blocks=4)
        {0: (0, 1, 1), 1: (0, 1, 1)}
    """
    clips = rows.stop - rows.start
    rows_of = {}
    for block in range(max((each.start or 0 for each in shared), default=0)):
        groups = [range(rows.start, rows.stop)]  # of the plain rows, then of every skipped pass
        for number, each in enumerate(shared):
            own = range(batch + number * clips, batch + (number + 1) * clips)
            groups.append(own if block >= (each.start or 0) else groups[each.parent - PLAIN])
        rows_of[block] = (*range(batch), *(row for group in groups[1:] for row in group))
    return rows_of


def in_rows(shared: Sequence[SharedPass], batch: int, clips: int) -> SkipPlan:
    """One plan for the wide batch: what each pass skips, in its rows."""
    plan = SkipPlan()
    for number, each in enumerate(shared):
        own = tuple(range(batch + number * clips, batch + (number + 1) * clips))
        for term in each.plan.terms:
            part = replace(term, rows=own)
            plan = part if plan.empty else plan | part
    return plan


def tokens(model: nn.Module, hidden: Tensor) -> int:
    """Tokens of one row: of a sequence `[B, T, C]` its length, of `[B, C, (F,) H, W]` the patches.

    Example:
        >>> tokens(nn.Identity(), torch.zeros(2, 77, 8)), tokens(nn.Identity(), torch.zeros(2, 4, 3, 8, 8))
        (77, 192)
    """
    if hidden.dim() < 4:
        return int(hidden.shape[1]) if hidden.dim() == 3 else 1
    config: Any = getattr(unwrap(model), "config", None)
    patch = getattr(config, "patch_size", None) or 1
    sides = (
        tuple(patch) if isinstance(patch, (tuple, list)) else (getattr(config, "patch_size_t", None) or 1, patch, patch)
    )
    volume = 1
    for length, side in zip(reversed(hidden.shape[2:]), reversed(sides), strict=False):
        volume *= max(1, int(length) // int(side))
    return volume


def fits(model: nn.Module, hidden: Any, rows: int) -> bool:
    """Whether `tail="auto"` takes one batch of so many rows."""
    if isinstance(hidden, (list, tuple)):
        hidden = hidden[0][None] if hidden and isinstance(hidden[0], Tensor) else None
    if not isinstance(hidden, Tensor):
        return False
    return tokens(model, hidden) * rows <= AUTO.get(hidden.device.type, 0)


def part_of(out: Any, rows: slice, size: int) -> Any:
    """Some rows of everything in a denoiser's output.

    Raises:
        SkipError: if the prediction has another number of rows.
    """
    if isinstance(out, Tensor):
        if out.shape[:1] != (size,):
            raise SkipError(
                f"tail='batched' ran {size} rows, and the denoiser returned {out.shape[0] if out.dim() else 'none'}: "
                f"use tail='separate'"
            )
        return out[rows]
    made = [_rows(value, rows, size) for value in (out.values() if isinstance(out, dict) else out)]
    return type(out)(**dict(zip(out, made, strict=True))) if isinstance(out, dict) else tuple(made)


def _rows(value: Any, rows: slice, size: int) -> Any:
    if isinstance(value, list) and len(value) == size:
        return value[rows]
    if isinstance(value, Tensor) and value.shape[:1] == (size,):
        return value[rows]
    if value is None or (isinstance(value, Tensor) and not value.dim()):
        return value
    raise SkipError(f"tail='batched' cannot take rows out of a {type(value).__name__} output: use tail='separate'")


def index_of(rows: slice, batch: int, copies: int) -> Tensor:
    """The rows of the wide batch, as rows of the pipeline's."""
    return torch.tensor([*range(batch), *[*range(rows.start, rows.stop)] * copies])
