"""Interceptor: stands at a denoiser's forward during `pipe(...)` and makes the pipeline's own guidance yield ours.

The pipeline is not changed. What holds at a step comes from the recipe, the forwards are made by `Passes`, and
`Delivery` says what each branch has to return for the pipeline's arithmetic to arrive at the wanted result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from skipguide import guidance
from skipguide.active import ActivePlan, Call, end_everywhere, hold_everywhere
from skipguide.arguments import batch_size
from skipguide.errors import SkipError
from skipguide.gate import gate_of
from skipguide.hosts.cache_contexts import ContextNames
from skipguide.pipelines.registry.described import PipelineSpec
from skipguide.pipelines.sampling.branch_parallel import SplitPasses
from skipguide.pipelines.sampling.caches import admit_cache
from skipguide.pipelines.sampling.caller import is_called_by
from skipguide.pipelines.sampling.delivery import Delivery
from skipguide.pipelines.sampling.ledger import GuidanceStats
from skipguide.pipelines.sampling.passes import Passes, Path, check_effect, first, with_first
from skipguide.pipelines.sampling.recipe import Moment, Recipe
from skipguide.pipelines.sampling.run import Run
from skipguide.pipelines.settings import GuidanceSettings


class Interceptor:
    """Guidance at one denoiser of one pipeline."""

    def __init__(
        self,
        settings: GuidanceSettings,
        pipe: Any,
        spec: PipelineSpec,
        denoiser: str,
        recipe: Recipe,
        run: Run,
        stats: GuidanceStats,
        group: Any = None,
    ) -> None:
        self.settings = settings
        self.pipe = pipe
        self.spec = spec
        self.denoiser = denoiser
        self.model: nn.Module = getattr(pipe, denoiser)
        self.recipe = recipe
        self.run = run
        self.stats = stats
        # without anything to do no block is touched: only the model's own gate listens, for the ledger
        self.works = bool(recipe.groups) or recipe.window is not None or settings.zero_star
        reuse, touch = settings.prefix_reuse, self.works
        self.passes: Passes
        if group is None:
            self.passes = Passes(self.model, reuse, stats, touch, settings.tail)
        else:
            self.passes = SplitPasses(self.model, reuse, stats, touch, group)
        self.delivery = Delivery(settings, pipe, spec, denoiser, run, stats)
        self.moment = Moment((), False, True)
        self._met: Any = None  # the run that was looked at
        self._shape: tuple[int, ...] = ()  # of the video in this call: some pipelines work on a part of its frames

    # -- installation -------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Put the gates in place and listen to the names of cache contexts."""
        self.passes.install()
        hold_everywhere(gate_of(self.model), self)
        ContextNames.listen(self.model)

    def remove(self) -> None:
        """Take everything away again."""
        end_everywhere(gate_of(self.model), self)
        ContextNames.leave(self.model)
        self.passes.remove()
        self.run.release()

    # -- one call of the denoiser -------------------------------------------------------------------------------

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of the denoiser by the pipeline: a branch of a step, or both."""
        if not is_called_by(self.pipe, self.model):
            return call(*args, **kwargs)
        joined = self.delivery.joined if self.works else None
        guide = self._passive if self.spec.is_passive(kwargs) else self._guided
        if joined is None:
            return guide(call, args, kwargs)
        return joined.apart(guide(joined.around(call), args, kwargs))

    def _passive(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A further pass of the pipeline's own: the other branches of this step may have been shifted."""
        out, extra = call(*args, **kwargs), self.run.extra
        return out if extra is None else with_first(out, self.delivery.shifted(first(out), extra))

    def _guided(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            branch = self.run.enter(self.pipe, self.spec, ContextNames.name(self.model))
            if not self.works:
                self.passes.enter(2 if branch == "both" else 1)
                return call(*args, **kwargs)
            run = self.run
            self._shape = tuple(getattr(kwargs.get("hidden_states"), "shape", ())[1:])
            if run.timesteps is not self._met:  # a cache can come and go between runs
                self._met = run.timesteps
                self.recipe.refuse_idle(run.steps)
                self.passes.settle()
                self.passes.meet(admit_cache(self.pipe, self.denoiser, self.model, self.settings, self.recipe))
            sigma = run.sigma(self.pipe) if self.recipe.needs_sigma else None
            self.moment = self.recipe.at(run.step, run.steps, sigma)
            if branch == "only" or (branch == "cond" and run.lone_cond):
                self._refuse_without_cfg()
            if branch == "both" and self.spec.cond_first:
                return self._turned(call, args, kwargs)
            return getattr(self, f"_{branch}")(call, args, kwargs)
        except BaseException:
            self.passes.clear()
            self.run.release()
            raise

    def _turned(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call with the rows [cond, uncond], as [uncond, cond] and back."""
        batch = batch_size(args, kwargs)
        order = torch.arange(batch).roll(batch // 2)
        out = self._both(call, *self.passes.rows(args, kwargs, order, batch))
        return with_first(out, first(out)[order.to(first(out).device)])

    def _refuse_without_cfg(self) -> None:
        settings = self.settings
        what = {
            "formula='uncond' skips layers in the unconditional pass": settings.formula == "uncond",
            "formula='segmented' has CFG in one range of steps": settings.formula == "segmented",
            "cfg_interval says where the unconditional pass is used": settings.cfg_interval is not None,
            "zero_star scales the unconditional prediction": settings.zero_star,
        }
        for words, asked in what.items():
            if asked:
                raise SkipError(f"{words}, but this run has none: turn CFG on (guidance_scale above 1)")

    def _both(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        batch, moment, passes = batch_size(args, kwargs), self.moment, self.passes
        half = batch // 2
        if batch % 2:
            raise SkipError(f"CFG is on, so rows [uncond, cond] were expected; got an odd batch of {batch}")
        conditional = slice(half, batch)
        if not moment.cfg:  # the conditional rows only, and every branch is their prediction
            mine = passes.rows(args, kwargs, conditional, batch)
            path = self._path(half)
            out = passes.plain(call, mine[0], mine[1], half, path=path, rows=slice(0, half), counted=2, ran=1)
            y = self._alone(first(out), path, call, mine, slice(0, half), half)
            self.run.extra = y - first(out) if self.spec.passive else None
            return with_first(out, torch.cat([y, y]))
        if self.settings.formula == "uncond" and moment.terms:
            out = passes.without_in(moment.terms[0].plan, half, call, args, kwargs, half)
            both = first(out)
            return with_first(out, torch.cat([self.delivery.scaled(both[:half], both[half:]), both[half:]]))
        path = self._path(half)
        rows = slice(0, half) if self.settings.formula == "wan" else conditional
        out = passes.plain(call, args, kwargs, half, path=path, rows=rows, counted=2)
        both = first(out)
        if not moment.terms and not self.settings.zero_star:
            return out
        u, c = self.delivery.scaled(both[:half], both[half:]), both[half:]
        if not moment.terms:
            return with_first(out, torch.cat([u, c]))
        mine = passes.rows(args, kwargs, rows, batch) if path is not None else (args, kwargs)
        delta = self._delta(u, c, path, call, mine, rows, batch)
        if self.delivery.mode() == "shift":
            self.run.extra = delta if self.spec.passive else None
            return with_first(out, torch.cat([self.delivery.shifted(u, delta), self.delivery.shifted(c, delta)]))
        return with_first(out, torch.cat(self.delivery.both(u, c, delta, self.run)))

    def _only(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        batch = batch_size(args, kwargs)
        path = self._path(batch)
        out = self.passes.plain(call, args, kwargs, batch, path=path, rows=slice(0, batch))
        if self.moment.terms:
            self.delivery.refuse_rescaling()
        y = self._alone(first(out), path, call, (args, kwargs), slice(0, batch), batch)
        self.run.extra = y - first(out) if self.spec.passive else None
        return with_first(out, y)

    def _cond(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        batch, moment, run = batch_size(args, kwargs), self.moment, self.run
        w = self.delivery.w()
        later = self.settings.formula == "uncond" or (self.settings.formula == "wan" and w is not None)
        if moment.cfg and (later or not moment.terms):  # whatever there is to do, the unconditional call does it
            out = self.passes.plain(call, args, kwargs, batch)
            run.cond = first(out)
            return out
        path = self._path(batch)
        out = self.passes.plain(call, args, kwargs, batch, path=path, rows=slice(0, batch))
        c, mine, rows = first(out), (args, kwargs), slice(0, batch)
        if not moment.cfg:  # the unconditional call will be answered with the same
            run.held = with_first(out, self._alone(c, path, call, mine, rows, batch))
            return run.held
        run.cond, run.delta = c, self._delta(None, c, path, call, mine, rows, batch)
        if self.delivery.mode() == "shift":
            return with_first(out, self.delivery.shifted(c, run.delta))
        # without knowledge of w this can only be a call without CFG; if the other branch comes, it is refused
        alone = w is None or self.delivery.weightless()
        return with_first(out, self.delivery.alone(c, run.delta)) if alone else out

    def _uncond(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        batch, moment, run, formula = batch_size(args, kwargs), self.moment, self.run, self.settings.formula
        held, run.held = run.held, None
        if not moment.cfg and held is not None:
            self.passes.enter(1, ran=0, passes=0)
            return held
        if (c := run.cond) is None:
            raise SkipError(
                "the unconditional call came before the conditional one; this pipeline is not driven as described"
            )
        path = None
        if formula == "uncond" and moment.terms:
            out = self.passes.without_in(moment.terms[0].plan, 0, call, args, kwargs, batch, counted=1)
        else:
            path = self._path(batch) if formula == "wan" else None
            out = self.passes.plain(call, args, kwargs, batch, path=path, rows=slice(0, batch))
        u, run.cond = self.delivery.scaled(first(out), c), None
        if not moment.terms or formula == "uncond":
            return with_first(out, u) if self.settings.zero_star else out
        if formula == "wan":
            run.delta = self._delta(u, c, path, call, (args, kwargs), slice(0, batch), batch)
        assert run.delta is not None
        delta, run.delta = run.delta, None
        if self.delivery.mode() == "shift":
            return with_first(out, self.delivery.shifted(u, delta))
        if formula != "wan" and self.delivery.weightless():
            return out
        return with_first(out, self.delivery.solved(u, c, delta, run))

    # -- what guidance adds -------------------------------------------------------------------------------------

    def _alone(self, c: Tensor, path: Path | None, call: Call, mine: Any, rows: slice, batch: int) -> Tensor:
        """The prediction of a step without CFG."""
        if not self.moment.terms or self.settings.formula == "uncond":
            return c
        return self.delivery.alone(c, self._delta(None, c, path, call, mine, rows, batch))

    def _path(self, clips: int) -> Path | None:
        """The skipped passes of this step; None if there are none, or the last differences are used again."""
        run, moment = self.run, self.moment
        if not moment.terms or self.settings.formula == "uncond":
            run.directions = None
            return None
        old = run.directions
        if old is not None and run.keys == self._keys() and len(old[0]) == clips and not moment.fresh:
            return None
        return self.passes.path([term.plan for term in moment.terms])

    def _keys(self) -> tuple[str, ...]:
        return (self.denoiser, str(self._shape), *(term.key for term in self.moment.terms))

    def _delta(
        self, u: Tensor | None, c: Tensor, path: Path | None, call: Call, mine: Any, rows: slice, batch: int
    ) -> Tensor:
        """What guidance adds to every branch of this step: the directions, run anew or used again, times the scales."""
        run, terms = self.run, self.moment.terms
        if path is not None:
            args, kwargs = mine
            skipped = self.passes.skipped(path, call, args, kwargs, rows, batch)
            wan = u is not None and self.settings.formula == "wan"
            base = guidance.cfg(u, c, self.delivery.need_w()) if wan and u is not None else c
            new = [
                guidance.skip_direction(base, skipped[term.plan], self.settings.apg, self.settings.apg_norm)
                for term in terms
            ]
            for term in terms:
                if term.key not in run.checked:
                    check_effect(u if wan and u is not None else c, skipped[term.plan], term.plan)
                    run.checked.add(term.key)
            if run.directions is not None and run.keys == self._keys() and self.settings.every > 1:
                self.stats.note_reuse(run.directions, new)
            run.directions, run.keys = new, self._keys()
        assert run.directions is not None
        delta, *others = (term.scale * d for term, d in zip(terms, run.directions, strict=True))
        for other in others:
            delta = delta + other
        if self.settings.every == 1:
            run.directions = None
        return delta
