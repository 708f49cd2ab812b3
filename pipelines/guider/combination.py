"""Combination: what a guider makes of the predictions of one modality, and what it keeps of them from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from skipguide import guidance
from skipguide.errors import SkipError
from skipguide.pipelines.sampling.ledger import GuidanceStats
from skipguide.pipelines.sampling.predictions import check_effect, widened
from skipguide.pipelines.sampling.schedule import StepPlan
from skipguide.pipelines.settings import GuidanceSettings

# the two predictions of a pipeline with a guider for each, by where its loop keeps them
MODALITIES = {"video": "video_pred", "audio": "audio_pred"}


def modality_of(batch: Any) -> str:
    """Which prediction a guider is given to combine; empty where the model makes one."""
    found = [name for name, kept in MODALITIES.items() if getattr(batch, kept, None) is batch.noise_pred]
    return found[0] if found else ""


class Combination:
    """The guidance of one prediction: the model's only one, that of the video, or of the sound.

    Args:
        settings: the guidance.
        stats: the ledger.
        modality: which of them; empty of a model with one.
    """

    def __init__(self, settings: GuidanceSettings, stats: GuidanceStats, modality: str) -> None:
        self.settings = settings
        self.stats = stats
        self.modality = modality
        self.directions: list[Tensor] | None = None
        self.difference: Tensor | None = None  # c - u of the last step that computed it
        self._keys: tuple[str, ...] = ()
        self._checked: set[str] = set()

    def holds(self, keys: tuple[str, ...]) -> bool:
        """Whether the last directions may be used again; they are let go of if they are of other layers."""
        if self._keys != keys and (keys or self.settings.schedule is None):
            self.directions = None
        return self.directions is not None

    def guided(
        self, plan: StepPlan, w: float, pred_cond: Tensor, pred_uncond: Tensor | None, skipped: Sequence[Tensor]
    ) -> Tensor:
        """CFG and skip guidance of a step, in float32 at least.

        Args:
            plan: what holds at the step.
            w: the CFG scale.
            pred_cond: c.
            pred_uncond: u; None on a step without CFG, or where the last difference c - u is used again.
            skipped: k of every group; none where the last directions are used again.
        """
        settings, c = self.settings, widened(pred_cond)
        u = self._uncond(plan, c, pred_uncond)
        if u is not None and settings.zero_star:
            u = guidance.zero_star_scale(u, c) * u
        y = c if u is None or w == 1 else guidance.cfg(u, c, w)
        if not plan.skipped or plan.skips_inside:
            return y
        if skipped:
            plain = pred_uncond if plan.place == "uncond" and pred_uncond is not None else pred_cond
            self._renew(plan, plain, w, u, c, skipped)
        return guidance.rescale(y + self._delta(plan, c), c, plan.rescale, settings.rescale_over)

    def _uncond(self, plan: StepPlan, c: Tensor, pred_uncond: Tensor | None) -> Tensor | None:
        """u, wide: as it was computed, or of c and the last difference."""
        if pred_uncond is None:
            return None if self.difference is None or not plan.cfg else c - self.difference
        u, old = widened(pred_uncond), self.difference
        if self.settings.reuses_cfg:
            self.difference = c - u
            if old is not None:
                self.stats.note_cfg_reuse(old, self.difference)
        return u

    def _renew(
        self, plan: StepPlan, plain: Tensor, w: float, u: Tensor | None, c: Tensor, skipped: Sequence[Tensor]
    ) -> None:
        """Take the directions of this step; `plain` is the prediction that the skipped ones are variants of."""
        settings, direction = self.settings, self.settings.rule.direction
        assert direction is not None
        for each, k in zip(plan.skipped, skipped, strict=True):
            if each.key not in self._checked:
                check_effect(plain, k, each.plan)
                self._checked.add(each.key)
        made = [direction(u, c, widened(k), w) for k in skipped]
        new = [guidance.apg(d, c, settings.apg, settings.apg_norm) for d in made]
        keys = tuple(each.key for each in plan.skipped)
        if self.directions is not None and self._keys == keys and settings.reuses_skip:
            self.stats.note_reuse(self.directions, new)
        self.directions, self._keys = new, keys

    def _delta(self, plan: StepPlan, c: Tensor) -> Tensor:
        """What guidance adds to CFG at this step."""
        if (directions := self.directions) is None or directions[0].shape != c.shape:
            raise SkipError("the skipped predictions of this step are missing, or of another size than c")
        scales = [each.scale[self.modality] if isinstance(each.scale, dict) else each.scale for each in plan.skipped]
        delta, *others = (scale * d for scale, d in zip(scales, directions, strict=True))
        if not self.settings.reuses_skip:
            self.directions = None
        return sum(others, start=delta)
