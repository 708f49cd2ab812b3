"""Delivery: how a guided prediction reaches the pipeline, whose own arithmetic comes after it.

`shift` adds the same delta to every branch of a step: exact for any combination of branches whose weights sum to one,
and needs no knowledge of w. `solve` chooses the unconditional branch so that the pipeline's own CFG arrives at the
wanted result: the only exact way where somebody rescales.

All of it is computed in float32 at least. A denoiser in half precision has predictions of its own dtype, and what the
pipeline can take of ours is a fact about its loop (`PipelineSpec.half`): float32 as it is, or rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skipguide import guidance
from skipguide.errors import SkipError
from skipguide.pipelines.registry.described import PipelineSpec
from skipguide.pipelines.sampling.call_stack import look_up
from skipguide.pipelines.sampling.concatenated_outputs import ConcatenatedOutputs
from skipguide.pipelines.sampling.ledger import GuidanceStats
from skipguide.pipelines.sampling.modalities import Modalities
from skipguide.pipelines.sampling.pipeline_call import PipelineCall
from skipguide.pipelines.sampling.predictions import widened
from skipguide.pipelines.sampling.rounding import Rounding
from skipguide.pipelines.sampling.schedule import StepOutline
from skipguide.pipelines.settings import GuidanceSettings


class Delivery:
    """The arithmetic between guidance and one denoiser's pipeline."""

    def __init__(
        self,
        settings: GuidanceSettings,
        pipe: Any,
        spec: PipelineSpec,
        denoiser: str,
        state: PipelineCall,
        stats: GuidanceStats,
    ) -> None:
        self.settings = settings
        self.pipe = pipe
        self.spec = spec
        self.scales = spec.scales[spec.denoisers.index(denoiser)]
        self.state = state
        self.stats = stats
        self.rounding = Rounding(stats)
        self.outputs = ConcatenatedOutputs() if spec.joined or spec.modalities else None
        self.modalities = Modalities(pipe, spec, state, self.outputs)
        self.now = StepOutline()  # what holds at the step that is running
        if spec.variances and (settings.zero_star or settings.apg is not None or settings.apg_norm is not None):
            raise SkipError(
                f"zero_star and apg look at a prediction as a whole, and half of what {type(pipe).__name__}'s denoiser "
                f"predicts are variances: leave them off"
            )

    def mode(self) -> str:
        """`solve` where somebody rescales, w is ours or the formula waits for u, else `shift`; anew at each call."""
        solve = solves(self.settings) or self._pipeline_rescales()
        self.stats.delivery = "solve" if solve else "shift"
        return self.stats.delivery

    def refuse_rescaling(self) -> None:
        """Without CFG, a pipeline that rescales to the conditional prediction would do so to the guided one.

        Raises:
            SkipError: if this pipeline would.
        """
        if self.outputs is not None and self._pipeline_rescales():
            raise SkipError(
                f"without CFG, {type(self.pipe).__name__} would rescale to the guided prediction itself: set "
                + " and ".join(f"{name.removeprefix('_')}=0" for name in self.spec.rescale.split())
            )

    def _pipeline_rescales(self) -> bool:
        if self.spec.cfg == "guider":
            return bool(getattr(self.pipe.guider, "guidance_rescale", 0.0))
        return any(name == "always" or look_up(self.pipe, name) for name in self.spec.rescale.split())

    def w(self) -> float | Tensor | None:
        """The CFG scale in force, or None if this call has no second branch or the pipeline does not tell."""
        if self.spec.cfg == "guider":
            guider = self.pipe.guider
            return float(guider.guidance_scale) if guider.num_conditions > 1 else None
        if self.spec.switch and not look_up(self.pipe, self.spec.switch):
            return None
        began = self.state.began if "w" in self.spec.kept else {}
        values = (began[name] if name in began else look_up(self.pipe, name) for name in self.scales)
        found = next((value for value in values if value is not None), None)
        return found if found is None or isinstance(found, Tensor) else float(found) + self.spec.offset

    def need_w(self) -> float | Tensor:
        """The CFG scale, for a formula that needs it.

        Raises:
            SkipError: if the pipeline keeps it to itself.
        """
        w = self.w()
        if w is None:
            raise SkipError(
                f"{type(self.pipe).__name__} keeps its CFG scale to itself, so rescale, a guidance_scale of ours and a "
                f"formula that needs it cannot be delivered with CFG on: use rescale=0 and formula='stg', or turn CFG "
                f"off"
            )
        if self.outputs is None:
            return w
        scales = [float(getattr(self.pipe, name)) for name in self.spec.joined]
        if 1 in scales:
            raise SkipError(
                f"{type(self.pipe).__name__} rescales or the formula needs its CFG scales, of which one is 1 "
                f"({', '.join(self.spec.joined)}): set all of them above 1, or none and no rescale"
            )
        return self.outputs.spread(scales)

    def cfg_scale(self) -> float | Tensor:
        """The CFG scale that holds: that of the settings, or the pipeline's."""
        return self.need_w() if self.now.w is None else self.now.w

    def weightless(self) -> bool:
        """Whether w is 1, as Wan 2.2's second scale may be: the conditional branch is the result, whatever u is."""
        w = self.w()
        return self.outputs is None and not isinstance(w, Tensor) and w == 1

    def delivered(self, y: Tensor, like: Tensor) -> Tensor:
        """A wide branch or result in the dtype that the pipeline can take in place of the prediction `like`."""
        wide = self.spec.half == "float32"
        return y.to(torch.promote_types(like.dtype, torch.float32) if wide else like.dtype)

    def shifted(self, prediction: Tensor, delta: Tensor) -> Tensor:
        """A branch plus the delta."""
        return self.delivered(widened(prediction) + delta, prediction)

    def without_cfg(self, c: Tensor, delta: Tensor) -> Tensor:
        """The final prediction of a step without CFG."""
        y = self.rescaled(widened(c) + (delta / self._weight() if self.spec.weight else delta), widened(c))
        out = self.delivered(y, c)
        self.rounding.note(out, y, delta)
        return out

    def _weight(self) -> float:
        """What the pipeline multiplies the prediction by, where another model's has the rest.

        Raises:
            SkipError: if that is 0, or the settings look at the result, which is made of both.
        """
        weight = float(look_up(self.pipe, self.spec.weight)[self.state.step])
        if weight and not self.now.rescale:
            return weight
        raise SkipError(
            f"{type(self.pipe).__name__} makes its result of the predictions of two models, so rescale, which looks "
            "at it, cannot be delivered: use rescale=0"
            if weight
            else f"{type(self.pipe).__name__} gives its prediction the weight 0 at step {self.state.step}: leave "
            "guidance out there (start, stop), or change its guidance_schedule"
        )

    def both_shifted(self, u: Tensor, c: Tensor, delta: Tensor, state: PipelineCall) -> tuple[Tensor, Tensor]:
        """Both branches of one call plus the delta; where each would be rounded, the result in place of both.

        What the branches were shifted by is kept in `state.extra`, for a pipeline with further passes of its own.
        """
        w = self.w() if self.outputs is None and c.element_size() < 4 else None
        if w is not None and self.spec.half == "once" and not self.spec.dynamic:
            moved = self._twice(guidance.cfg(widened(u), widened(c), w) + delta, c, delta)
            state.extra = moved[1] - widened(c) if self.spec.passive else None
            return moved
        state.extra = delta if self.spec.passive else None
        moved = self.delivered(widened(u) + delta, c), self.shifted(c, delta)  # a scaled u is wide
        if w is not None and self.spec.half == "rounded":
            self._note_pair(moved, u, c, delta, w)
        return moved

    def uncond_shifted(self, u: Tensor, c: Tensor, delta: Tensor) -> Tensor:
        """The unconditional branch of two calls plus the delta; the conditional one was shifted before."""
        moved = self.delivered(widened(u) + delta, c)
        w = self.w() if self.outputs is None and c.element_size() < 4 else None
        if w is not None and self.spec.half != "float32":
            self._note_pair((moved, self.shifted(c, delta)), u, c, delta, w)
        return moved

    def _note_pair(self, moved: tuple[Tensor, Tensor], u: Tensor, c: Tensor, delta: Tensor, w: float | Tensor) -> None:
        wanted = guidance.cfg(widened(u), widened(c), w) + delta
        self.rounding.note(guidance.cfg(widened(moved[0]), widened(moved[1]), w), wanted, delta)

    def branches(self, u: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Both branches of one call without a delta: as they are, or where u was scaled, as `both_shifted` does."""
        if u.dtype == c.dtype:
            return u, c
        if self.spec.half == "once" and self.outputs is None and (w := self.w()) is not None:
            y = self.delivered(guidance.cfg(u, widened(c), w), c)
            return y, y
        return self.delivered(u, c), c

    def _twice(self, y: Tensor, c: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        out = self.delivered(y, c)
        self.rounding.note(out, y, delta)
        return out, out

    def both(self, u: Tensor, c: Tensor, delta: Tensor | None, state: PipelineCall) -> tuple[Tensor, Tensor]:
        """Both branches of one call, for the pipeline's CFG to arrive at ours plus the delta, rescaled."""
        # CFG of two equal branches is that branch, whatever w is, to the last bit; but c has to stay where the pipeline
        # looks at it apart (its own rescaling or further passes). A scale per frame may be 1 at some of them, where
        # solving for u is no way at all
        w = self.w() if self.now.w is not None else self.need_w()
        per_frame = self.outputs is None and isinstance(w, Tensor)
        if per_frame or not (self._pipeline_rescales() or self.spec.passive):
            return self._twice(self._result(u, c, delta, state), c, delta)
        return self.solved(u, c, delta, state), c

    def solved(self, u: Tensor, c: Tensor, delta: Tensor | None, state: PipelineCall) -> Tensor:
        """The unconditional branch for which the pipeline's CFG is ours plus the delta, rescaled."""
        return self._solve(self._result(u, c, delta, state), c, delta)

    def given(self, y: Tensor, c: Tensor, state: PipelineCall) -> tuple[Tensor, Tensor]:
        """Both branches of one call, for the pipeline's CFG to arrive at a result that was made elsewhere."""
        self.stats.delivery = "solve"
        if self._pipeline_rescales() and not (self.outputs is None and isinstance(self.need_w(), Tensor)):
            return self._solve(y, c, y - widened(c)), c
        out = self._twice(y, c, y - widened(c))
        state.extra = widened(out[1]) - widened(c) if self.spec.passive else None
        return out

    def given_uncond(self, y: Tensor, c: Tensor) -> Tensor:
        """The unconditional branch of two calls, for the pipeline's CFG to arrive at a result made elsewhere."""
        self.stats.delivery = "solve"
        return self._solve(y, c, y - widened(c))

    def _solve(self, y: Tensor, c: Tensor, delta: Tensor | None) -> Tensor:
        w = self.need_w()
        out = self.delivered(guidance.solve_uncond(y, widened(c), w), c)
        if out.element_size() < 4:
            self.rounding.note(guidance.cfg(widened(out), widened(c), w), y, delta)
        return out

    def _result(self, u: Tensor, c: Tensor, delta: Tensor | None, state: PipelineCall) -> Tensor:
        """What the pipeline's CFG is to arrive at, in float32; `delta` is None on a step without a skip direction.

        Raises:
            SkipError: if the pipeline will use another w than it has now.
        """
        w = self.cfg_scale()
        if self.now.w is None and self.spec.dynamic and self._changes_w(w, state):
            raise SkipError(
                f"{type(self.pipe).__name__} changes w after the forward (use_dynamic_cfg), so rescale, and a "
                f"formula that needs w, cannot be delivered exactly: use rescale=0 and formula='stg', or turn dynamic "
                f"CFG off"
            )
        y = guidance.cfg(widened(u), widened(c), w)
        return y if delta is None else self.rescaled(y + delta, widened(c))

    def _changes_w(self, w: float | Tensor, state: PipelineCall) -> bool:
        """Whether this call changes w after the forward; where it does not say, whether it has done so."""
        said = look_up(
            self.pipe, "call.use_dynamic_cfg", optional=True
        )  # from the first step on, while w is still what it was
        return bool(w != state.w) if said is None else bool(said)

    def rescaled(self, y: Tensor, c: Tensor) -> Tensor:
        """With the deviation brought towards that of c, if the settings say so."""
        amount, over = self.now.rescale, self.settings.rescale_over
        if not amount or not self.spec.variances:
            return self.modalities.rescaled(y, c, amount, over)
        (y, rest), c = y.chunk(2, dim=1), c.chunk(2, dim=1)[0]
        return torch.cat([guidance.rescale(y, c, amount, over), rest], dim=1)

    def projected(self, d: Tensor, c: Tensor) -> Tensor:
        """A skip direction, projected if the settings say so."""
        return self.modalities.projected(d, c, self.settings.apg, self.settings.apg_norm)

    def scaled(self, u: Tensor, c: Tensor) -> Tensor:
        """The unconditional prediction with CFG-Zero*'s factor, wide, if the settings say so; else as it is."""
        return self.modalities.starred(widened(u), widened(c)) if self.settings.zero_star else u


def solves(settings: GuidanceSettings) -> bool:
    """Whether guidance is delivered through the unconditional branch, whatever the pipeline does."""
    return bool(settings.rescale or settings.guidance_scale is not None or settings.rule.waits_for_uncond)
