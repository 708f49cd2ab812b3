"""Finite watch: whether every prediction of a run was a number, noted on the device and read once, at the run's end.

Reading a tensor waits for the device, which has steps of work queued. So each prediction leaves a number there, and the
numbers are read after the last pass of the last step, where nothing is queued behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from skipguide.errors import SkipError

Kind = Literal["plain", "skipped", "guided"]
_WORDS: dict[Kind, str] = {  # of those that began at the same step, the first is the cause of the others
    "plain": "the denoiser's own prediction is not finite: use a smaller scale, or a wider dtype (float16 overflows)",
    "skipped": "the prediction without layers is not finite: skip others, or use a wider dtype (float16 overflows)",
    "guided": "the guided prediction is not finite, or too large for anything to be made of it: use a smaller scale, "
    "or a wider dtype (float16 overflows)",
}
_NEVER = 2**30


class FiniteWatch:
    """What is noted of one run, shared by the denoisers of a pipeline."""

    def __init__(self) -> None:
        self._since: dict[tuple[Kind, torch.device], Tensor] = {}  # the first step that was not finite
        self._run: Any = None

    def begin(self, run: Any) -> None:
        """A call of the pipeline goes on, or a new one begins.

        Args:
            run: what each call of the pipeline has a new one of.

        Raises:
            SkipError: if a prediction of the call before, which was interrupted, was not finite.
        """
        if run is not self._run:
            self._run = run
            self.settle("the call before this one, which was interrupted")

    def see(self, kind: Kind, prediction: Tensor, step: int) -> None:
        """Note whether a prediction is finite, and its square too, without waiting for the answer."""
        wide = prediction.dtype if prediction.dtype.itemsize > 4 else torch.float32
        fine = torch.linalg.vector_norm(prediction.detach(), dtype=wide).isfinite()
        key = kind, prediction.device
        since, before = torch.where(fine, _NEVER, step), self._since.get(key)
        self._since[key] = since if before is None else torch.minimum(before, since)

    def see_step(self, predictions: Mapping[str, Tensor], guided: Tensor, step: int) -> None:
        """Note it of the predictions of a guider's step, by the guider's names, and of what it makes of them."""
        for name, prediction in predictions.items():
            self.see("skipped" if "skip" in name else "plain", prediction, step)
        self.see("guided", guided, step)

    def settle(self, where: str = "this run") -> None:
        """Read what was noted and begin anew.

        Args:
            where: which run it was, for the error.

        Raises:
            SkipError: if a prediction was not finite, naming the step and the pass.
        """
        noted, self._since = self._since, {}
        found = {(int(step), list(_WORDS).index(kind)) for (kind, _), step in noted.items()}
        step, number = min(found, default=(_NEVER, 0))
        if step < _NEVER:
            raise SkipError(f"from step {step} (counted from 0) of {where} on, {list(_WORDS.values())[number]}")

    def forget(self) -> None:
        """Let go of the notes of a run that failed in another way."""
        self._since = {}
