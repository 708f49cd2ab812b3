"""Driver: one denoiser under a guider. Gates are installed for the capturing and the skipped passes of a step only."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from skipguide.active import ActivePlan, Call, end_everywhere, everywhere_at, hold_everywhere
from skipguide.arguments import batch_size
from skipguide.blocks import find_blocks
from skipguide.errors import SkipError
from skipguide.gate import gate_of
from skipguide.pipelines.groups import SkipGroup
from skipguide.pipelines.guider.step_batches import StepBatch
from skipguide.pipelines.native.listener import refuse_native_reuse
from skipguide.pipelines.presets import find_preset
from skipguide.pipelines.sampling.caches import admit_cache
from skipguide.pipelines.sampling.interceptor import Interceptor
from skipguide.pipelines.sampling.ledger import GuidanceStats
from skipguide.pipelines.sampling.passes import DenoiserPasses
from skipguide.pipelines.sampling.schedule import GuidanceSchedule, SkippedPass
from skipguide.pipelines.sampling.step_passes import StepPasses
from skipguide.pipelines.settings import GuidanceSettings


class Driver:
    """The passes of one denoiser as a guider's pipeline calls them, one by one.

    Args:
        settings: the guidance.
        groups: its groups; layers that are None become those of the model's preset.
        model: the denoiser.
        stats: the ledger.

    Raises:
        SkipError: for an unknown model, layers or parts that it does not have, or somebody else at work on it.
    """

    def __init__(
        self,
        settings: GuidanceSettings,
        groups: Sequence[SkipGroup],
        model: nn.Module,
        stats: GuidanceStats,
    ) -> None:
        self.model = model
        self.stats = stats
        self.settings = settings
        if settings.whole_preset and groups:
            filled = replace(settings.filled(find_preset(model)), guidance_scale=None)
            if (filled.window, filled.rule) != (settings.window, settings.rule):
                raise SkipError(
                    f"the preset of this {type(model).__name__} has start={filled.start}, stop={filled.stop} and "
                    f"formula={filled.formula!r}, which a guider has to know before the first step: use "
                    f"SkipGuider(...).attach(pipe), or pass them"
                )
            self.settings, groups = filled, (filled.group,)
        chosen = [
            replace(group, layers=find_preset(model).layers) if group.layers is None else group for group in groups
        ]
        self.schedule = GuidanceSchedule(self.settings, chosen, find_blocks(model))
        self.passes = DenoiserPasses(model, settings.prefix_reuse, stats, schedule=settings.schedule)
        self._begun = False  # whether a pass of this run was prepared
        self.skipped: tuple[SkippedPass, ...] = ()
        self._step: StepPasses | None = None
        self._now: tuple[int, StepBatch] | None = None
        self._called = self._standing = False

    # -- what the pipeline's loop announces ---------------------------------------------------------------------

    def prepare(self, now: StepBatch, skipped: tuple[SkippedPass, ...], step: int) -> None:
        """Note that the next call of the model is this pass. Gates are installed unless it is a plain one.

        A cache has a state for each branch, and answers for blocks that are to be counted: with one, a plain pass is
        no exception.

        Raises:
            SkipError: for a cache that guidance does not go together with.
        """
        self._now, self._called, self.skipped = (threading.get_ident(), now), False, skipped
        cache = self.passes.cache
        if not self._begun or now.kind in ("capture", "weak"):  # once a step: it looks through the whole model
            cache = admit_cache(None, "", self.model, self.settings, self.schedule)
        if not self._begun or cache != self.passes.cache:
            self._begun = True
            self.passes.set_cache(cache)
        self.passes.branch = now.name
        self.passes.choices.begin(step)
        every = cache is not None or self.passes.choices.installed  # what happens to blocks of plain passes too
        if (every or now.kind in ("capture", "weak")) and not self._standing:
            self._begin()

    def finish(self, last: bool) -> None:
        """Note that the call is done. After the last skipped pass of the step the gates are removed.

        Raises:
            SkipError: if the model was not called since `prepare`.
        """
        if self._now is None:
            raise SkipError("cleanup_models was called before prepare_models: this loop does not drive guiders")
        now, self._now = self._now[1], None
        if now.kind == "plain" and not self._standing:
            self.passes.enter(1)
        elif not self._called:
            self.end()
            raise SkipError(
                f"the guider was given a {type(self.model).__name__}, which was not called for {now.name}: nothing "
                f"would have been skipped. Does the pipeline call another module, or a copy of this one?"
            )
        if last:
            self.end()

    def _begin(self) -> None:
        gate = gate_of(self.model)
        if everywhere_at(gate, Interceptor):
            raise SkipError("SpatiotemporalSkipGuidance is applied to this denoiser: remove() it, or the guider")
        refuse_native_reuse(self.model, "SkipGuider")
        self.passes.reinstall()
        hold_everywhere(gate, self)
        self._standing = True

    def end(self, over: bool = False) -> None:
        """Leave the model as it was; the passes stay prepared for the next step.

        Args:
            over: whether the run is over: what a cache keeps of the skipped passes is forgotten then.
        """
        if over:
            self.passes.forget()
        if self._standing:
            self._standing = False
            end_everywhere(gate_of(self.model), self)
            self._step = None
            self.passes.pause()

    # -- the call of the model ----------------------------------------------------------------------------------

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the denoiser. Calls from other threads belong to somebody else and run plainly."""
        if self._now is None or self._now[0] != threading.get_ident():
            return call(*args, **kwargs)
        now = self._now[1]
        try:
            if self._called:
                raise SkipError(f"the pipeline calls its denoiser twice for {now.name}; a guider skips in one call")
            self._called = True
            return self._run(now, call, args, kwargs)
        except BaseException:
            self.passes.fail()
            self.end()
            raise

    def _run(self, now: StepBatch, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rows = batch_size(args, kwargs)
        plans = [each.plan for each in self.skipped]
        if now.kind == "plain":
            return self.passes.plain(call, args, kwargs, rows)
        if now.kind == "weak":
            return self.passes.skipped_inside(plans[0], 0, call, args, kwargs, rows, counted=1)
        if now.kind == "capture":
            self._step = self.passes.prepared(plans)
            return self.passes.plain(call, args, kwargs, rows, step=self._step)
        began = time.perf_counter()
        if self._step is None:
            raise SkipError(f"{now.name} came before the pass that it starts from")
        number = self._step.plans.index(plans[now.group])
        out = self.passes.skipped_pass(self._step, number, call, args, kwargs, slice(0, rows), rows)
        self.stats.seconds += time.perf_counter() - began
        return out
