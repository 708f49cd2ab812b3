"""Interceptor: stands at a denoiser's forward during `pipe(...)` and makes the pipeline's own guidance yield ours.

The pipeline is not changed. Either the same delta is added to every branch of a step (`shift`: exact for any
combination of branches whose weights sum to one, and needs no knowledge of w), or the unconditional branch is solved
for so that the pipeline's own CFG arrives at the wanted result (`solve`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from skipguide import guidance
from skipguide.acts import Arguments
from skipguide.blocks import unwrap
from skipguide.errors import NoEffectError, SkipError
from skipguide.gate import Call, Gate, gate_of
from skipguide.pipelines.ledger import GuidanceStats
from skipguide.pipelines.registry import PipelineSpec
from skipguide.pipelines.run import Run
from skipguide.plan import Schedule, SkipPlan
from skipguide.resume import Prefix
from skipguide.skipper import Skipper, batch_size

if TYPE_CHECKING:
    from skipguide.pipelines.stg import SpatiotemporalSkipGuidance


class Interceptor:
    """Guidance at one denoiser of one pipeline."""

    def __init__(
        self,
        settings: SpatiotemporalSkipGuidance,
        pipe: Any,
        spec: PipelineSpec,
        denoiser: str,
        layers: tuple[int, ...],
        run: Run,
        stats: GuidanceStats,
    ) -> None:
        self.settings = settings
        self.pipe = pipe
        self.spec = spec
        self.model: nn.Module = getattr(pipe, denoiser)
        self.scales = spec.scales[spec.denoisers.index(denoiser)]
        self.run = run
        self.stats = stats
        self.schedule = Schedule(settings.start, settings.stop, settings.every)
        self.plan = SkipPlan(layers, part=settings.part)
        self.context = ""
        self.arguments = Arguments(unwrap(self.model))
        self.rows_plans: dict[int, Skipper] = {}

        reuse = settings.prefix_reuse and settings.formula != "uncond"
        self.captured = Prefix(min(layers)) if reuse else None
        self.replayed = Prefix(min(layers)) if reuse else None
        self.plain = Skipper(self.model, SkipPlan(), capture=self.captured)
        self.skipping = Skipper(self.model, self.plan, resume=self.replayed)
        # at scale 0 no block is touched: only the model's own gate listens, for the ledger
        self.parts: list[Skipper | Gate] = [self.plain, self.skipping] if settings.scale else [gate_of(self.model)]
        self.blocks = len(self.plain.map)
        self.shared = self.plain.map.spec.shared

    # -- installation -------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Put the gates in place and listen to the names of cache contexts."""
        done: list[Skipper | Gate] = []
        try:
            for part in self.parts:
                part.install()
                done.append(part)
        except BaseException:
            for part in reversed(done):
                part.remove()
            raise
        gate_of(self.model).handlers += (self,)
        if hasattr(self.model, "cache_context"):
            original: Any = self.model.cache_context
            self.model.__dict__["cache_context"] = partial(self._named, original)

    def remove(self) -> None:
        """Take everything away again."""
        gate = gate_of(self.model)
        gate.handlers = tuple(handler for handler in gate.handlers if handler is not self)
        self.model.__dict__.pop("cache_context", None)
        for part in reversed(self.parts):
            part.remove()
        self._clear()

    @contextmanager
    def _named(self, original: Callable[..., AbstractContextManager[None]], name: str, **where: Any) -> Iterator[None]:
        before, self.context = self.context, name
        try:
            with original(name, **where):
                yield
        finally:
            self.context = before

    # -- one call of the denoiser -------------------------------------------------------------------------------

    def __call__(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the denoiser by the pipeline: a branch of a step, or both."""
        if any(kwargs.get(name) is not None for name in self.spec.passive):
            return call(*args, **kwargs)
        try:
            branch = self.run.enter(self.pipe, self.spec, self.context)
            if not self.settings.scale:
                self._enter_plain(2 if branch == "both" else 1)
                return call(*args, **kwargs)
            return getattr(self, f"_{branch}")(call, args, kwargs)
        except BaseException:
            self._clear()
            raise

    def _both(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        batch = batch_size(args, kwargs)
        half = batch // 2
        if batch % 2:
            raise SkipError(f"CFG is on, so rows [uncond, cond] were expected; got an odd batch of {batch}")
        if self.settings.formula == "uncond":
            skipper = self._on_uncond_rows(half) if self._active() else self.plain
            return self._pass(skipper, call, args, kwargs, half, counted=2)
        out = self._pass(self.plain, call, args, kwargs, half, counted=2)
        if not self._active():
            return out
        both = first(out)
        u, c = both[:half], both[half:]
        rows = slice(0, half) if self.settings.formula == "wan" else slice(half, batch)
        self._refresh(u, c, lambda: self._skipped(call, *self._rows(args, kwargs, rows, batch), rows, batch))
        if self._delivery() == "shift":
            return with_first(out, torch.cat([self._shifted(u), self._shifted(c)]))
        return with_first(out, torch.cat([self._solved(u, c), c]))

    def _only(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.settings.formula == "uncond":
            raise SkipError(
                "formula='uncond' skips layers in the unconditional pass, but CFG is off: raise guidance_scale above 1"
            )
        out, c = self._conditional(call, args, kwargs)
        if not self._active():
            return out
        return with_first(out, self._rescaled(self._shifted(c), c))

    def _cond(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.settings.formula == "uncond" and self.run.lone_cond:
            raise SkipError(
                "formula='uncond' skips layers in the unconditional pass, but this run has none: turn CFG on"
            )
        if self.settings.formula == "uncond" or (self.settings.formula == "wan" and self._w() is not None):
            out = self._pass(self.plain, call, args, kwargs, batch_size(args, kwargs))
            self.run.cond = first(out)
            return out
        out, c = self._conditional(call, args, kwargs)
        if not self._active():
            return out
        self.run.cond = c
        if self._delivery() == "shift":
            return with_first(out, self._shifted(c))
        # without knowledge of w this can only be a call without CFG; if the other branch comes, it is refused
        return out if self._w() is not None else with_first(out, self._rescaled(self._shifted(c), c))

    def _uncond(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        batch, active = batch_size(args, kwargs), self._active()
        if self.settings.formula == "uncond":
            return self._pass(self.skipping if active else self.plain, call, args, kwargs, batch)
        out = self._pass(self.plain, call, args, kwargs, batch)
        if not active:
            return out
        u, c = first(out), self.run.cond
        if c is None:
            raise SkipError(
                "the unconditional call came before the conditional one; this pipeline is not driven as described"
            )
        if self._delivery() == "shift":
            return with_first(out, self._shifted(u))
        if self._w() is None:
            raise SkipError(
                f"{type(self.pipe).__name__} keeps its true_cfg_scale to itself, so rescale and formula='wan' cannot "
                f"be delivered with true CFG on: use rescale=0 and formula='stg', or turn true CFG off"
            )
        if self.settings.formula == "wan":
            rows = slice(0, batch)
            self._refresh(u, c, lambda: self._skipped(call, args, kwargs, rows, batch))
        return with_first(out, self._solved(u, c))

    def _conditional(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Tensor]:
        """The conditional prediction, and a fresh delta when it is time for one."""
        batch = batch_size(args, kwargs)
        out = self._pass(self.plain, call, args, kwargs, batch)
        c = first(out)
        if self._active():
            self._refresh(c, c, lambda: self._skipped(call, args, kwargs, slice(0, batch), batch))
        return out, c

    # -- the arithmetic -----------------------------------------------------------------------------------------

    def _refresh(self, u: Tensor, c: Tensor, skipped: Callable[[], Tensor]) -> None:
        """Compute the delta of this step, or keep the last one on the steps in between."""
        run = self.run
        if run.delta is not None and run.delta.shape == c.shape and not self.schedule.fresh(run.step, run.steps):
            self._clear()
            return
        k = skipped()
        s = float(self.settings.scale)
        if self.settings.formula == "wan" and u is not c:
            run.delta = guidance.wan_delta(u, c, k, self._need_w(), s)
        else:
            run.delta = guidance.skip_delta(c, k, s)
        if not run.checked:
            self._check(u if self.settings.formula == "wan" else c, k)
            run.checked = True

    def _check(self, plain: Tensor, skipped: Tensor) -> None:
        if not torch.isfinite(plain).all():
            raise SkipError("the denoiser's plain prediction is not finite; guidance has nothing to work on")
        if not torch.isfinite(skipped).all():
            raise SkipError(
                f"the prediction without layers {list(self.plan.layers)} is not finite: skip others, or use float32"
            )
        # another batch size moves the last bits, so equality is to rounding in full precision
        slack = 2e-6 if plain.dtype in (torch.float32, torch.float64) else 0.0
        if (plain - skipped).abs().max() <= slack * plain.abs().max():
            raise NoEffectError(
                f"skipping layers {list(self.plan.layers)} ({self.plan.part}) did not change the prediction: the "
                f"guidance would silently do nothing. Are these layers already bypassed, or their weights zero?"
            )

    def _shifted(self, prediction: Tensor) -> Tensor:
        assert self.run.delta is not None
        return (prediction + self.run.delta).to(prediction.dtype)

    def _solved(self, u: Tensor, c: Tensor) -> Tensor:
        assert self.run.delta is not None
        w = self._need_w()
        if self.spec.dynamic and w != self.run.w:
            raise SkipError(
                f"{type(self.pipe).__name__} changes w after the forward (use_dynamic_cfg), so rescale and "
                f"formula='wan' cannot be delivered exactly: use rescale=0 and formula='stg', or turn dynamic CFG off"
            )
        y = guidance.cfg(u.float(), c.float(), w) + self.run.delta
        return guidance.solve_uncond(self._rescaled(y, c.float()), c.float(), w).to(u.dtype)

    def _rescaled(self, y: Tensor, c: Tensor) -> Tensor:
        if self.settings.rescale == 0:
            return y
        return guidance.rescale(y, c, self.settings.rescale, self.settings.rescale_over)

    def _delivery(self) -> str:
        """`solve` where somebody rescales or the formula needs w, `shift` everywhere else."""
        if self.settings.rescale or self.settings.formula == "wan" or self._pipeline_rescales():
            self.stats.delivery = "solve"
        return self.stats.delivery

    def _pipeline_rescales(self) -> bool:
        if self.spec.cfg == "guider":
            return bool(getattr(self.pipe.guider, "guidance_rescale", 0.0))
        return bool(self.spec.rescale and getattr(self.pipe, self.spec.rescale, 0.0))

    def _w(self) -> float | None:
        """The CFG scale in force, or None if this call has no second branch or the pipeline does not tell."""
        if self.spec.cfg == "guider":
            guider = self.pipe.guider
            return float(guider.guidance_scale) if guider.num_conditions > 1 else None
        values = (getattr(self.pipe, name, None) for name in self.scales)
        return next((float(value) for value in values if value is not None), None)

    def _need_w(self) -> float:
        w = self._w()
        if w is None:
            raise SkipError(f"{type(self.pipe).__name__} does not tell its CFG scale")
        return w

    # -- passes -------------------------------------------------------------------------------------------------

    def _active(self) -> bool:
        return self.schedule.active(self.run.step, self.run.steps)

    def _rows(self, args: Any, kwargs: Any, rows: slice, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.arguments.rows(args, kwargs, rows, batch, self.shared)

    def _on_uncond_rows(self, half: int) -> Skipper:
        if half not in self.rows_plans:
            plan = SkipPlan(self.plan.layers, part=self.plan.part, rows=tuple(range(half)))
            self.rows_plans[half] = Skipper(self.model, plan)
        return self.rows_plans[half]

    def _skipped(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], rows: slice, batch: int) -> Tensor:
        """The prediction without the layers, from where it first differs from the plain pass."""
        began = time.perf_counter()
        if self.captured is not None and self.replayed is not None:
            self.replayed.streams.update(self.captured.select(rows, batch).streams)
        context = getattr(self.model, "cache_context", None)
        try:
            with context("skip") if context is not None else nullcontext():
                out = self._pass(self.skipping, call, args, kwargs, rows.stop - rows.start, counted=0)
        finally:
            self._clear()
        self.stats.seconds += time.perf_counter() - began
        self.stats.blocks_naive += self.blocks
        return first(out)

    def _pass(
        self,
        skipper: Skipper,
        call: Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        clips: int,
        counted: int = 1,
    ) -> Any:
        """One forward under a plan, entered in the ledger; `counted` plain passes it stands for."""
        before = sum(skipper.stats.rows.values())
        with skipper.running():
            out = call(*args, **kwargs)
        ran = sum(skipper.stats.rows.values()) - before
        # nothing can be counted inside a compiled graph, where the plan is what runs
        self._enter_plain(counted, ran // clips or self._planned(skipper, counted))
        return out

    def _enter_plain(self, counted: int, ran: int | None = None) -> None:
        """Enter one forward that stands for `counted` plain passes; None: they ran whole."""
        plain = counted * self.blocks
        self.stats.passes += 1
        self.stats.blocks_run += plain if ran is None else ran
        self.stats.blocks_plain += plain
        self.stats.blocks_naive += plain

    def _planned(self, skipper: Skipper, counted: int) -> int:
        """The blocks that a pass under one of our plans runs, per clip."""
        removed = len(self.plan.layers) if self.plan.part == "block" else 0
        if skipper is self.plain:
            return counted * self.blocks
        if skipper is self.skipping:
            return self.blocks - (self.captured.layer if self.captured is not None else 0) - removed
        return 2 * self.blocks - removed

    def _clear(self) -> None:
        for prefix in (self.captured, self.replayed):
            if prefix is not None:
                prefix.clear()


def first(out: Any) -> Tensor:
    """The prediction in a denoiser's output: a tensor, a tuple, or a model output."""
    tensor: Tensor = out if isinstance(out, Tensor) else out[0]
    return tensor


def with_first(out: Any, tensor: Tensor) -> Any:
    """The same kind of output with another prediction."""
    if isinstance(out, Tensor):
        return tensor
    if isinstance(out, tuple):
        return (tensor, *out[1:])
    return type(out)(**{**out, next(iter(out)): tensor})
