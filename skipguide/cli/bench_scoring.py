"""Scores of a setting's clips, read from its files."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from skipguide.bench.scorer import Scorer
from skipguide.bench.scores import DIVERSITY, as_array, clip_scores, diversity, small
from skipguide.cli.bench_requests import BenchRequest


def score_setting(requests: Sequence[BenchRequest], scorer: Scorer | None) -> dict[str, Any]:
    """Everything that is said of one setting's clips, as plain data.

    Args:
        requests: its clips, which are all there.
        scorer: the user's own.

    Returns:
        `clips` (each with its seed and scores), `of_prompts` (scores that need all seeds of a prompt), `own` (the
        user's scores by seed), and `seconds` of a clip.
    """
    found, seconds = [], []
    thumbnails: dict[int, list[Any]] = {}
    for request in requests:
        frames, notes = request.frames(), request.notes()
        scores = {**(notes.get("model_scores") or {}), **clip_scores(as_array(frames))}
        found.append({"file": request.clip.file, "seed": request.seed, "prompt": request.number, "scores": scores})
        thumbnails.setdefault(request.number, []).append(small(frames))
        seconds.append(float(notes.get("seconds") or 0.0))
    apart = {number: diversity(clips) for number, clips in thumbnails.items()}
    known = {number: value for number, value in apart.items() if value is not None}
    return {
        "clips": found,
        "of_prompts": {DIVERSITY: known} if known else {},
        "own": _own(requests, scorer) if scorer is not None else {},
        "seconds": statistics.fmean(seconds),
    }


def _own(requests: Sequence[BenchRequest], scorer: Scorer) -> dict[str, dict[int, float]]:
    """The user's scores: name -> seed -> mean."""
    found: dict[str, dict[int, float]] = {}
    for seed in dict.fromkeys(request.seed for request in requests):
        mine = [request for request in requests if request.seed == seed]
        clips, prompts = [request.frames() for request in mine], [request.job.args.prompt for request in mine]
        for name, value in scorer(clips, prompts).items():
            found.setdefault(name, {})[seed] = value
    return found
