"""Branch parallel: the branches of a step on several devices, one process each; every rank gets every prediction.

All ranks run the same script with the same seeds (SPMD), so that each of them is called with the same latents. Of a
step a rank runs only its share of the branches, and the predictions are then broadcast:

* CFG in two calls, or none: one rank runs the plain pass, while another one runs the skipped pass, for the same rows
  and so with the same bits as a single process. It needs nothing from the first: it computes the beginning itself, in
  the time that it would have waited for it.
* CFG in one batch: the rows of the two branches part. The skipped pass goes on from the conditional one's captured
  streams, on its rank, or runs on a third. Equal to rounding, as every change of the batch.

A step takes the time of the longest share: with CFG in two calls 2N of 3N - 1 - l blocks, in one batch 2N - 1 - l, or N
with three ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from skipguide.active import Call
from skipguide.arguments import batch_size
from skipguide.errors import SkipError
from skipguide.pipelines.sampling.ledger import GuidanceStats
from skipguide.pipelines.sampling.passes import DenoiserPasses
from skipguide.pipelines.sampling.predictions import first, with_first
from skipguide.pipelines.sampling.step_passes import StepPasses
from skipguide.plan import SkipPlan
from skipguide.skipper import Skipper

Job = str
APART = 1e-3  # relative: latents further apart than this are not the same latents on other hardware


def group_of(branch_parallel: Any) -> Any:
    """The process group that `branch_parallel` names; None without it.

    Raises:
        SkipError: without `torch.distributed`, or with a single rank.
    """
    if branch_parallel is None or branch_parallel is False:
        return None
    if not (distributed.is_available() and distributed.is_initialized()):
        raise SkipError(
            "branch_parallel shares the branches of a step between processes: start the script with `accelerate "
            "launch` or torchrun and call torch.distributed.init_process_group() first"
        )
    group = distributed.group.WORLD if branch_parallel is True else branch_parallel
    if distributed.get_world_size(group) < 2:
        raise SkipError("branch_parallel needs at least two processes; this group has one")
    return group


def refuse_cache(cache: str | None) -> None:
    """Refuse a cache on a denoiser whose branches are shared: what it keeps would be on the rank that ran it last.

    Raises:
        SkipError: if there is one.
    """
    if cache is not None:
        raise SkipError(f"{cache} and branch_parallel do not work together: call disable_cache() on the denoiser")


class BranchParallelPasses(DenoiserPasses):
    """The forwards of one denoiser, of which this rank runs its share.

    Args:
        model: the denoiser; the same weights on every rank.
        reuse: as in `DenoiserPasses`.
        stats: the ledger: `blocks_run` and `passes` are this rank's, what they are compared with is the whole step's.
        touch: as in `DenoiserPasses`.
        group: the ranks.
    """

    def __init__(self, model: nn.Module, reuse: bool, stats: GuidanceStats, touch: bool, group: Any) -> None:
        super().__init__(model, reuse, stats, touch)
        self.group = group
        self.rank = distributed.get_rank(group)
        self.size = distributed.get_world_size(group)
        self._whole_skippers: dict[SkipPlan, Skipper] = {}
        stats.rank, stats.ranks = self.rank, self.size

    def set_cache(self, cache: str | None) -> None:
        """As in `DenoiserPasses`; a cache that was enabled during the guidance is refused."""
        refuse_cache(cache)
        super().set_cache(cache)

    def remove(self) -> None:
        """Take everything away again."""
        super().remove()
        self._whole_skippers.clear()

    def plain(
        self,
        call: Call,
        args: Any,
        kwargs: Any,
        clips: int,
        *,
        step: StepPasses | None = None,
        rows: slice | None = None,
        counted: int = 1,
        ran: int = 0,
    ) -> Any:
        """The plain pass, shared; the predictions of the skipped passes come with it."""
        batch = batch_size(args, kwargs)
        plans = step.plans if step is not None else ()
        halves = [slice(0, batch)] if counted < 2 or ran else [slice(0, batch // 2), slice(batch // 2, batch)]
        source = halves.index(rows) if step is not None and rows in halves else len(halves) - 1
        # the half that is skipped comes second, so that with two ranks its skipped passes go on from it
        order = [half for half in halves if half is not halves[source]] + [halves[source]]
        owners = {f"rows {half.start}": place % self.size for place, half in enumerate(order)}
        home = owners[f"rows {halves[source].start}"]
        others = [rank for rank in range(self.size) if rank not in owners.values()]
        for number in range(len(plans)):
            owners[f"skip {number}"] = others[number % len(others)] if others else home
        together = not others

        def run() -> dict[Job, Any]:
            made: dict[Job, Any] = {}
            for half in halves:
                job, here = f"rows {half.start}", half is halves[source] and together
                if owners[job] == self.rank:
                    mine = self.rows(args, kwargs, half, batch)
                    own = step if here else None
                    made[job] = DenoiserPasses.plain(self, call, *mine, clips, step=own, counted=0, ran=1)
                    if own is not None:
                        count = half.stop - half.start
                        found = DenoiserPasses.skipped(self, own, call, *mine, slice(0, count), count)
                        made |= {f"skip {number}": found[plan] for number, plan in enumerate(plans)}
            for number, plan in enumerate(plans):
                if not together and owners[f"skip {number}"] == self.rank:
                    made[f"skip {number}"] = self._whole_pass(plan, call, args, kwargs, halves[source], batch, clips)
            return made

        naive = self.stats.blocks_naive
        found = self._shared(run, owners, args, kwargs)
        self.stats.blocks_naive = naive + len(plans) * self.blocks
        self.enter(counted, ran=0, passes=0)
        if step is not None:
            step.ready = {plan: first(found[f"skip {number}"]) for number, plan in enumerate(plans)}
        parts = [found[f"rows {half.start}"] for half in halves]
        return parts[0] if len(parts) == 1 else with_first(parts[0], torch.cat([first(part) for part in parts]))

    def _whole_pass(
        self, plan: SkipPlan, call: Call, args: Any, kwargs: Any, rows: slice, batch: int, clips: int
    ) -> Any:
        """A whole pass without the layers: its beginning is computed while another rank computes the same."""
        if plan not in self._whole_skippers:
            self._whole_skippers[plan] = Skipper(self.model, plan)
            self._standing.install(self._whole_skippers[plan])
        removed = sum(len(term.layers) for term in plan.terms if term.perturbation.removes)
        mine = self.rows(args, kwargs, rows, batch)
        return self._pass(self._whole_skippers[plan], call, *mine, clips, 0, self.blocks - removed)

    # -- between the ranks --------------------------------------------------------------------------------------

    def _shared(
        self, run: Callable[[], dict[Job, Any]], owners: dict[Job, int], args: Any, kwargs: Any
    ) -> dict[Job, Any]:
        """What every job made, on every rank.

        Raises:
            SkipError: on all ranks, if one of them failed or was called with something else.
        """
        made: dict[Job, Any] = {}
        failure: BaseException | None = None
        try:
            made = run()
            shapes = {job: _output_kind(out) for job, out in made.items()}
        except BaseException as error:
            failure, shapes = error, {}
        payload = {"error": f"{type(failure).__name__}: {failure}" if failure else None, "shapes": shapes}
        gathered: list[Any] = [None] * self.size
        distributed.all_gather_object(gathered, payload | {"sum": self._checksum(args, kwargs)}, group=self.group)
        if failure is not None:
            raise failure
        for rank, other in enumerate(gathered):
            if other["error"]:
                raise SkipError(f"rank {rank} failed, so this step cannot be finished here: {other['error']}")
        self._compare([other["sum"] for other in gathered])
        like = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        out: dict[Job, Any] = {}
        for job, owner in owners.items():
            kind, shape, dtype = gathered[owner]["shapes"][job]
            if job in made:
                tensor = first(made[job]).contiguous()
            else:
                tensor = torch.empty(shape, dtype=dtype, device=like.device)
            distributed.broadcast(tensor, src=distributed.get_global_rank(self.group, owner), group=self.group)
            out[job] = made[job] if job in made else _output_of(kind, tensor)
        return out

    def _checksum(self, args: Any, kwargs: Any) -> list[float]:
        """Mean and norm of every floating-point input: inputs that differ give other numbers."""
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point() and v.dim()]
        numbers = [number for tensor in tensors for number in (tensor.double().mean(), tensor.double().norm())]
        return torch.stack(numbers).tolist() if numbers else []

    def _compare(self, sums: list[list[float]]) -> None:
        for rank, other in enumerate(sums):
            if len(other) != len(sums[0]) or any(
                abs(a - b) > APART * max(1.0, abs(a)) for a, b in zip(sums[0], other, strict=True)
            ):
                raise SkipError(
                    f"rank {rank} was called with other latents or prompts than rank 0: with branch_parallel every "
                    f"rank makes the same call, with generators of the same seed"
                )


def _output_kind(out: Any) -> tuple[Any, tuple[int, ...], torch.dtype]:
    """What kind of output it is, and the shape and type of the prediction in it.

    Raises:
        SkipError: for an output with more than a prediction.
    """
    values = [out] if isinstance(out, Tensor) else list(out.values()) if isinstance(out, dict) else list(out)
    tensor, *rest = values
    if not isinstance(tensor, Tensor) or any(value is not None for value in rest):
        raise SkipError("branch_parallel broadcasts one prediction, and this denoiser returns more: leave it out")
    kind: Any = None
    if isinstance(out, dict):
        kind = type(out), next(iter(out))
    elif not isinstance(out, Tensor):
        kind = tuple, len(rest)
    return kind, tuple(tensor.shape), tensor.dtype


def _output_of(kind: Any, tensor: Tensor) -> Any:
    """An output of that kind with this prediction."""
    if kind is None:
        return tensor
    return (tensor, *[None] * kind[1]) if kind[0] is tuple else kind[0](**{kind[1]: tensor})
