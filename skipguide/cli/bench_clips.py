"""`skipguide bench` on a diffusion pipeline: plain CFG first, then skip guidance against it and its controls."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from skipguide.bench import settings as rows
from skipguide.bench.scorer import Scorer
from skipguide.bench.scores import MARGIN, SCORES, Score
from skipguide.bench.settings import Missing, Setting
from skipguide.bench.summary import Row, by_seed, choose_baseline, compare
from skipguide.cli import pipeline_calls
from skipguide.cli.arguments import GUIDANCE_FLAGS, given
from skipguide.cli.bench_requests import BenchClips, BenchRequest
from skipguide.cli.clip_requests import ClipModel
from skipguide.cli.processes import Process
from skipguide.cli.result_cells import Result, ResultCells
from skipguide.config import number
from skipguide.errors import SkipError

QUICK_STEPS = 0.6  # of the model's own number
EFFECTIVE_CLIPS = 2  # that the effective scale is averaged over


@dataclass(frozen=True)
class Table:
    """What a bench of a pipeline found.

    Attributes:
        rows: every setting with its scores, compared.
        missing: the rows that could not be had.
        scores: what is known of each score.
        judge: the score that chose the baseline; None where none could.
        decides: whether that score may say that guidance helps: one of the user's own, or named by the user.
        baseline: the best plain CFG.
        candidate: the guidance that the controls are of; None where there is none.
        steps: of the sampler.
        edge: whether the best scale is at the edge of the grid.
    """

    rows: list[Row]
    missing: list[Missing]
    scores: dict[str, Score]
    judge: str | None
    decides: bool
    baseline: Setting
    candidate: Setting | None
    steps: int
    edge: bool


class ClipBench:
    """The stages of a bench.

    Args:
        args: the parsed command line.
        model: what is measured.
        lines: the prompts.
        folder: of the results.
        process: which process this is.
        scorer: the user's own, or None.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        model: ClipModel,
        lines: Sequence[argparse.Namespace],
        folder: Path,
        process: Process,
        scorer: Scorer | None,
    ) -> None:
        self.args, self.model, self.lines = args, model, lines
        self.scorer = scorer
        self.steps = steps_of(args, model)
        lines = [argparse.Namespace(**{**vars(line), "steps": self.steps}) for line in lines]
        self.clips = BenchClips(folder / "clips", model, lines, args.seeds, process, force=args.force)
        self.cells = ResultCells(folder / "cells", process)
        self.grid = grid_of(args, model)
        self.own = own_scale(model)
        self.scores: dict[str, Score] = dict(SCORES)

    def run(self) -> Table:
        """Make what is missing, score it, compare."""
        plain = rows.plain_grid(self.grid)
        alone: list[Setting] = []
        if not self.args.quick and self.grid[0] is not None:
            alone = [Setting("no-cfg", "without CFG: one pass a step instead of two", "reference", w=1.0, cost=0.5)]
        self.clips.make([*plain, *alone], "plain CFG")
        values = self._scored([*plain, *alone])
        judge = self._judge(values[: len(plain)])
        better = self.scores[judge].better if judge is not None else None
        pairs = [(row.setting, row.values) for row in values[: len(plain)]]
        baseline = choose_baseline(pairs, judge, better, self.own)
        found, missing, candidate = self._guided(baseline)
        if found:
            self.clips.make(found, "skip guidance and controls")
        table = compare([*values, *self._scored(found)], baseline.name)
        scales = [w for w in self.grid if w is not None]
        edge = baseline.w is not None and rows.at_edge(baseline.w, scales)
        decides = judge is not None and (judge not in SCORES or self.args.judge is not None)
        return Table(table, missing, self.scores, judge, decides, baseline, candidate, self.steps, edge)

    # -- which rows ---------------------------------------------------------------------------------------------

    def _guided(self, baseline: Setting) -> tuple[list[Setting], list[Missing], Setting | None]:
        """The rows beside plain CFG, those that cannot be had, and the one that controls are of."""
        missing: list[Missing] = []
        found: list[Setting] = []
        for name, note in (
            ("own", "the settings of the command line"),
            ("preset", "the model's preset"),
            ("auto", "the layer that calibration chooses (`skipguide rank`), whole, at scale 1"),
        ):
            if name == "own" and not given(self.args, GUIDANCE_FLAGS):
                continue
            arguments = self._arguments(name)
            if "refused" in arguments:
                missing.append(Missing(name, str(arguments["refused"])))
            else:
                found.append(rows.guided(name, note, baseline.w, arguments["arguments"]))
        self._costed(found, missing)
        if not found:
            return [], missing, None
        candidate = found[0]
        more: list[Setting] = []
        if baseline.w is not None:
            scales = [w for w in self.grid if w is not None]
            more += rows.frugal(baseline.w, scales, candidate.guidance or {})
        if self._about(candidate)["direction"]:
            more.append(rows.random_control(candidate))
        else:
            missing.append(Missing("random-direction", f"the formula of {candidate.name} has no direction of its own"))
        self._costed(more, missing)
        for each in (rows.more_steps(baseline, candidate, self.steps), self._effective(candidate)):
            (missing if isinstance(each, Missing) else more).append(each)  # type: ignore[arg-type]
        return [*found, *more], missing, candidate

    def _arguments(self, name: str) -> Result:
        """The arguments of a guidance, looked up once for all processes; or why there are none."""

        def resolve() -> Result:
            own = argparse.Namespace(**{flag: getattr(self.args, flag, None) for flag in GUIDANCE_FLAGS})
            if name != "own":
                for flag in GUIDANCE_FLAGS:
                    setattr(own, flag, "auto" if (name, flag) == ("auto", "layers") else None)
            try:
                return {"arguments": pipeline_calls.guidance_arguments(own, self.clips.load())}
            except SkipError as error:
                if name == "own":
                    raise
                return {"refused": str(error)}

        depends = {"model": self.model.made_with, "flags": given(self.args, GUIDANCE_FLAGS) if name == "own" else name}
        return self.cells.once(f"settings-{name}", depends, resolve)

    def _costed(self, found: list[Setting], missing: list[Missing]) -> None:
        """Put in what each row costs, and take out those that the model refuses."""
        kept = []
        for each in found:
            about = self._about(each)
            if "refused" in about:
                missing.append(Missing(each.name, str(about["refused"])))
            else:
                kept.append(replace(each, cost=float(about["cost"])))
        found[:] = kept

    def _about(self, setting: Setting) -> Result:
        """What a row costs, and whether its formula has a direction; or why it cannot be had."""

        def resolve() -> Result:
            pipe, cfg = self.clips.load(), self.grid[0] is not None
            try:
                guidance = pipeline_calls.make_guidance(setting.guidance or {})
                cost = float(guidance.cost(pipe, guidance=cfg, steps=self.steps).ratio_to_plain)
                return {"cost": round(cost, 4), "direction": guidance.for_pipeline(pipe).rule.direction is not None}
            except SkipError as error:
                if setting.name == "own":
                    raise
                return {"refused": str(error)}

        depends = {"model": self.model.made_with, "guidance": setting.guidance, "steps": self.steps, "grid": self.grid}
        return self.cells.once(f"cost-{setting.name}", depends, resolve)

    def _effective(self, candidate: Setting) -> Setting | Missing:
        """Plain CFG at what the candidate amounts to, measured on its first clips."""

        def measure() -> Result:
            from skipguide.bench.directions import effective_scale

            pipe, found = self.clips.load(), []
            for request in self.clips.requests(candidate)[:: self.args.seeds][:EFFECTIVE_CLIPS]:
                job = request.job

                def run(guidance: Any, request: BenchRequest = request) -> Any:
                    own = request.job.args
                    bar = {"disable": True}
                    return pipeline_calls.sample(pipe, own.prompt, request.job.call, own.seed, guidance, bar=bar)

                if job.args.image is not None:
                    return {"refused": "it is measured on text-to-video pipelines only"}
                try:
                    found.append(effective_scale(candidate.guidance or {}, pipe, run))
                except SkipError as error:
                    return {"refused": f"the effective scale of {candidate.name} is not known: {error}"}
            return {"scale": sum(found) / len(found), "clips": len(found)}

        depends = {"with": self.clips.requests(candidate)[0].clip.made_with}
        result = self.cells.once("effective-scale", depends, measure)
        if "refused" in result:
            return Missing("effective-scale", str(result["refused"]))
        return rows.effective_cfg(candidate, float(result["scale"]))

    # -- scores -------------------------------------------------------------------------------------------------

    def _judge(self, plain: Sequence[Row]) -> str | None:
        """The score that decides: the one that was named, the user's own, or the prompt margin, if all rows have it."""
        named = self.args.judge
        known = [name for name in self.scores if all(name in row.values for row in plain)]
        if named is not None and (named not in known or self.scores[named].better is None):
            able = [name for name in known if self.scores[name].better is not None]
            raise SkipError(f"--judge {named} cannot decide: expected one of {', '.join(able) or 'none here'}")
        own = [name for name in known if name not in SCORES]
        return named or next(iter(own), MARGIN if MARGIN in known else None)

    def _scored(self, settings: Sequence[Setting]) -> list[Row]:
        """The rows of these settings, from the clips that are there."""
        from skipguide.cli.bench_scoring import score_setting

        every = {setting.name: self.clips.requests(setting) for setting in settings}

        scorer = self.scorer.name if self.scorer is not None else None
        depends = {
            name: {"clips": [request.notes().get("sha256") for request in requests], "scorer": scorer}
            for name, requests in every.items()
        }
        results = self.cells.all(
            settings,
            name=lambda setting: f"scores-{setting.name}",
            depends=lambda setting: depends[setting.name],
            make=lambda setting: score_setting(every[setting.name], self.scorer),
            what="scores",
        )
        if self.scorer is not None:
            for name in dict.fromkeys(name for result in results for name in result["own"]):
                self.scores[name] = self.scorer.score(name)
        return [row_of(setting, result) for setting, result in zip(settings, results, strict=True)]


def row_of(setting: Setting, result: Result) -> Row:
    """A row from what `score_setting` wrote down."""
    values = by_seed([(clip["seed"], clip["scores"]) for clip in result["clips"]])
    for name, of in {**result["of_prompts"], **result["own"]}.items():
        values[name] = {int(key): float(value) for key, value in of.items()}
    return Row(setting, values, float(result["seconds"]))


def own_scale(model: ClipModel) -> float | None:
    """The CFG scale that a call has if nothing is said; None for a pipeline that takes none."""
    taken = pipeline_calls.parameters(model.pipeline_class).get("guidance_scale")
    if taken is None:
        return None
    return number(model.defaults.get("guidance_scale", taken.default)) or 5.0


def grid_of(args: argparse.Namespace, model: ClipModel) -> tuple[float | None, ...]:
    """The CFG scales to try.

    Raises:
        SkipError: for scales that the pipeline does not take.
    """
    own = own_scale(model)
    if own is None:
        if args.grid:
            raise SkipError(f"{model.pipeline_class.__name__} takes no guidance_scale: leave --grid out")
        return (None,)
    if args.grid:
        return tuple(dict.fromkeys(args.grid))
    return rows.scale_grid(own, rows.QUICK_FACTORS if args.quick else rows.FACTORS)


def steps_of(args: argparse.Namespace, model: ClipModel) -> int:
    """Steps of the sampler: as given, else the model's own number, or a part of it.

    Raises:
        SkipError: for a pipeline that does not say.
    """
    taken = pipeline_calls.parameters(model.pipeline_class).get("num_inference_steps")
    if taken is None:
        raise SkipError(f"{model.pipeline_class.__name__} has no num_inference_steps, which the controls change")
    if args.steps is not None:
        return int(args.steps)
    own = number(model.defaults.get("num_inference_steps", taken.default))
    if own is None:
        raise SkipError(f"{model.pipeline_class.__name__} does not say how many steps it takes: give --steps")
    return max(2, round(QUICK_STEPS * own)) if args.quick else int(own)
