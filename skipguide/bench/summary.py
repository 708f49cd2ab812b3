"""Summary: from the scores of every clip to a row per setting, the baseline, and what can be said. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from skipguide.bench.intervals import Better, Interval, paired
from skipguide.bench.scores import Score
from skipguide.bench.settings import Setting

Values = Mapping[str, Mapping[int, float]]  # score -> seed (or prompt) -> its mean


@dataclass(frozen=True)
class Row:
    """A setting with its scores.

    Attributes:
        setting: what it is.
        values: score -> seed (or prompt) -> mean over the others.
        seconds: of a clip.
        means: score -> mean over all.
        against: score -> difference to the baseline with its interval; empty for the baseline.
    """

    setting: Setting
    values: Values
    seconds: float
    means: dict[str, float] = field(default_factory=dict)
    against: dict[str, Interval] = field(default_factory=dict)

    def to_dict(self, scores: Mapping[str, Score]) -> dict[str, Any]:
        """Plain data."""
        return {
            **self.setting.to_dict(),
            "seconds_per_clip": round(self.seconds, 3),
            "scores": {
                name: {
                    "mean": mean,
                    "values": {str(key): value for key, value in self.values[name].items()},
                    "over": scores[name].over,
                    **(self._against(name, scores[name].better) if name in self.against else {}),
                }
                for name, mean in self.means.items()
            },
        }

    def _against(self, name: str, better: Better | None) -> dict[str, Any]:
        found = self.against[name]
        return {"difference": found.to_dict(), "verdict": found.verdict(better)}


def by_seed(clips: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, dict[int, float]]:
    """Score -> seed -> mean over the clips of that seed.

    Args:
        clips: seed and scores of every clip.
    """
    found: dict[str, dict[int, list[float]]] = {}
    for seed, scores in clips:
        for name, value in scores.items():
            found.setdefault(name, {}).setdefault(seed, []).append(value)
    return {
        name: {seed: statistics.fmean(values) for seed, values in of_seeds.items()} for name, of_seeds in found.items()
    }


def choose_baseline(
    rows: Sequence[tuple[Setting, Values]], judge: str | None, better: Better | None, own: float | None
) -> Setting:
    """The best of the plain rows.

    Args:
        rows: of plain CFG.
        judge: the score that decides; None where there is none that can.
        better: its direction.
        own: the model's own CFG scale, which is the baseline where no score decides.
    """
    if judge is not None and better is not None:
        sign = 1 if better == "higher" else -1
        scored = [(statistics.fmean(values[judge].values()), row) for row, values in rows if judge in values]
        if scored:
            return max(scored, key=lambda each: sign * each[0])[1]
    return min((row for row, _ in rows), key=lambda row: abs((row.w or 0) - (own or 0)))


def compare(rows: Sequence[Row], baseline: str) -> list[Row]:
    """The rows with their means, and their differences to the baseline's in pairs."""
    reference = next(row for row in rows if row.setting.name == baseline)
    found = []
    for row in rows:
        means = {name: statistics.fmean(values.values()) for name, values in row.values.items()}
        against: dict[str, Interval] = {}
        if row is not reference:
            for name, values in row.values.items():
                if (difference := paired(values, reference.values.get(name, {}))) is not None:
                    against[name] = difference
        found.append(Row(row.setting, row.values, row.seconds, means, against))
    return found


def conclusion(rows: Sequence[Row], candidate: str, baseline: str, judge: str, better: Better) -> str:
    """What can be said of the candidate: better than the baseline *and* every control, or not.

    Args:
        rows: all of them, compared.
        candidate: the guidance whose controls were run.
        baseline: the best plain CFG.
        judge: the score.
        better: its direction.
    """
    named = {row.setting.name: row for row in rows}
    own = named[candidate].values.get(judge, {})
    others = [named[baseline], *(row for row in rows if row.setting.kind == "control")]
    beaten: list[str] = []
    open_: list[str] = []
    lost: list[str] = []
    for row in others:
        difference = paired(own, row.values.get(judge, {}))
        verdict = difference.verdict(better) if difference is not None else ""
        {"better": beaten, "worse": lost}.get(verdict, open_).append(row.setting.name)
    if lost:
        return f"By {judge}, {candidate} loses to {_and(lost)}: here skipping does not help."
    if open_:
        tail = f" It beats {_and(beaten)}." if beaten else ""
        return (
            f"By {judge}, {candidate} cannot be told from {_and(open_)} with these clips: that skipping helps is not "
            f"shown.{tail} More seeds make the intervals narrower."
        )
    return (
        f"By {judge}, {candidate} beats the best plain CFG ({baseline}) and every control that was run: it helps here."
    )


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
