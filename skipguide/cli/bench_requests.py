"""The clips of a bench: every setting, prompt and seed, made as `generate --prompts` makes clips."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from skipguide.bench.settings import RANDOM, Setting
from skipguide.cli import clip_job, pipeline_calls
from skipguide.cli.arguments import GUIDANCE_FLAGS
from skipguide.cli.clip_folder import Clip, ClipFolder
from skipguide.cli.clip_job import ClipJob
from skipguide.cli.clip_requests import ClipMaker, ClipModel, ClipRequest, described, job_of
from skipguide.cli.file_locks import FolderLocks
from skipguide.cli.outputs import read_json, sidecar, slug
from skipguide.cli.processes import Process
from skipguide.errors import SkipError
from skipguide.hosts.progress import progress_bar, say

logger = logging.getLogger(__name__)
APART = 1000  # noise of one seed for so many prompts
UNDONE = ("timesteps", "sigmas")  # arguments that say the steps of a longer run than the one that measures


@dataclass(frozen=True)
class BenchRequest(ClipRequest):
    """One clip of the table.

    Attributes:
        setting: its row.
        number: of its prompt, from 0.
        seed: from 0; what pairs are made by.
    """

    setting: Setting
    number: int
    seed: int

    @property
    def path(self) -> Path:
        """The clip's file."""
        return self.folder.folder / self.clip.file

    def notes(self) -> dict[str, Any]:
        """What was noted of the clip.

        Raises:
            SkipError: if somebody removed it.
        """
        found = read_json(sidecar(self.path))
        if found is None:
            raise SkipError(f"{self.path} was removed while the bench ran: run it again")
        return found

    def frames(self) -> list[Any]:
        """The clip itself, every pixel as it was made."""
        from skipguide.media import pictures
        from skipguide.media.frames import open_picture

        if self.path.suffix == ".png":
            return [open_picture(self.path)]
        notes = self.notes()
        return pictures.open_webp(self.path, int(notes["frames"]), float(notes["fps"]))


class BenchClips:
    """The clips of a bench, in one folder per setting.

    Args:
        folder: holds the settings' folders.
        model: what makes them.
        lines: the prompts, each with the arguments of its own.
        seeds: how many clips of each prompt.
        process: which process this is.
        force: replace clips that were made with other settings.
    """

    def __init__(
        self,
        folder: Path,
        model: ClipModel,
        lines: Sequence[argparse.Namespace],
        seeds: int,
        process: Process,
        *,
        force: bool,
    ) -> None:
        self.folder = folder
        self.model = model
        self.lines = lines
        self.seeds = seeds
        self.process = process
        self.force = force
        self.locks = FolderLocks(folder)
        self.maker = BenchMaker([], process)

    def requests(self, setting: Setting) -> list[BenchRequest]:
        """Every clip of a row."""
        folder = ClipFolder(self.folder / setting.name, [], "replace" if self.force else "refuse")
        found = [
            self._request(folder, setting, number, line, seed)
            for number, line in enumerate(self.lines)
            for seed in range(self.seeds)
        ]
        folder.clips = [request.clip for request in found]
        return found

    def make(self, settings: Sequence[Setting], what: str) -> None:
        """Make the clips that are missing, together with the other processes.

        Raises:
            SkipError: for a folder with clips of other settings.
        """
        requests = [request for setting in settings for request in self.requests(setting)]
        folders = list({id(request.folder): request.folder for request in requests}.values())
        for folder in folders:
            folder.check()
        self.maker.requests = requests
        with progress_bar(what=what, total=len(requests), unit="clip", show=self.process.shows, leave=True) as progress:
            self.locks.share(
                self.process.order(requests),
                name=lambda request: f"{request.setting.name}-{request.clip.stem}",
                done=lambda request: request.folder.done(request.clip),
                make=partial(self.maker.make, partial(say, progress)),
                progress=lambda request: progress.update(),
            )
        for folder in folders:
            folder.write_manifest()

    def load(self) -> Any:
        """The pipeline."""
        if not self.maker.requests:
            raise SkipError("no clip was asked for yet")
        return self.maker.pipeline

    def _request(
        self, folder: ClipFolder, setting: Setting, number: int, line: argparse.Namespace, seed: int
    ) -> BenchRequest:
        own = argparse.Namespace(**vars(line))
        for name in GUIDANCE_FLAGS:
            setattr(own, name, None)
        own.seed, own.zoom, own.no_guidance = APART * seed + number, 1, setting.guidance is None
        if setting.w is not None:
            own.guidance_scale = setting.w
        if setting.steps is not None:
            own.steps = setting.steps
        guidance = {**setting.guidance, "direction": setting.direction} if setting.guidance is not None else None
        call, made_with = described(self.model, own, guidance)
        kind = "webp" if self.model.video else "png"
        clip = Clip(f"{number + 1:05d}-{slug(own.prompt, 40)}-seed{seed}.{kind}", made_with)
        job = job_of(self.model, own, call, folder, clip)
        return BenchRequest(folder, clip, job, setting, number, seed)


class BenchMaker(ClipMaker):
    """Makes the clips of a bench: with controls, and with what the model itself says of each clip."""

    _warned = False

    def settings(self, request: ClipRequest) -> dict[str, Any]:
        """The arguments of the guidance, which are known already."""
        assert isinstance(request, BenchRequest)
        return dict(request.setting.guidance or {})

    def produce(self, request: ClipRequest, job: ClipJob, bar: Mapping[str, Any]) -> clip_job.MadeClip:
        """One clip, and its self-consistency where the pipeline can say it."""
        from skipguide.bench.consistency import CALLBACK, LastLatents, can_measure
        from skipguide.bench.directions import random_direction

        assert isinstance(request, BenchRequest)
        settings = self.settings(request)
        random = request.setting.direction == RANDOM
        applied = random_direction(settings, self.pipeline, job.args.seed) if random else None
        last = LastLatents() if can_measure(job.pipeline_class) else None
        # plain CFG is without the pipeline's own skip guidance, which guided calls turn off too
        more: dict[str, Any] = {} if settings else pipeline_calls.without_native(self.pipeline)
        if last is not None:
            more[CALLBACK] = last
        made = clip_job.make_clip(job, self.pipeline, settings, bar, applied=applied, more=more)
        notes = {**made.notes, "setting": request.setting.to_dict()}
        if last is not None and last.latents is not None:
            notes["model_scores"] = self._model_scores(job, request, last.latents)
        return replace(made, notes=notes)

    def _model_scores(self, job: ClipJob, request: BenchRequest, latents: Any) -> dict[str, float]:
        from skipguide.bench.consistency import prompt_margin, self_consistency
        from skipguide.bench.scores import CONSISTENCY, MARGIN

        call = {name: value for name, value in job.call.items() if name not in UNDONE}
        self.pipeline.set_progress_bar_config(disable=True)
        arguments = {"prompt": job.args.prompt, **pipeline_calls.without_native(self.pipeline), **call}
        seed = request.job.args.seed
        found: dict[str, float] = {}
        try:
            found[CONSISTENCY] = self_consistency(self.pipeline, arguments, latents, seed)
            found[MARGIN] = prompt_margin(found[CONSISTENCY], self.pipeline, arguments, latents, seed)
        except (SkipError, ValueError, TypeError, RuntimeError) as error:
            if type(error).__name__ == "OutOfMemoryError":
                raise
            if not self._warned:  # the table has no such columns then
                what = MARGIN if found else CONSISTENCY
                logger.warning("%s cannot tell the %s of a clip: %s", type(self.pipeline).__name__, what, error)
            self._warned = True
        return {name: round(value, 6) for name, value in found.items()}
