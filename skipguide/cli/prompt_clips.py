"""The clips of a file of prompts: `skipguide generate --prompts`, shared by the processes that work on one folder."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from skipguide.cli import clip_job, models, pipeline_calls
from skipguide.cli.arguments import GUIDANCE_FLAGS, given
from skipguide.cli.clip_folder import MANIFEST, Clip, ClipFolder
from skipguide.cli.clip_job import ClipJob
from skipguide.cli.outputs import slug, versions
from skipguide.cli.processes import Process, this_process
from skipguide.cli.prompts import read_prompts
from skipguide.errors import SkipError

MANIFEST_EVERY = 5.0  # seconds: how far the manifest of a running job may be behind


@dataclass(frozen=True)
class ClipRequest:
    """One clip that is to be made: how, and what for."""

    clip: Clip
    job: ClipJob


def run(args: argparse.Namespace) -> None:
    """Make the clips that are missing, together with the other processes."""
    if args.force and args.keep:
        raise SkipError("--force replaces clips that were made with other settings and --keep leaves them: give one")
    lines = read_prompts(args.prompts, args)
    target = args.output if args.output is not None else Path(f"{args.prompts.stem}-clips")
    process = this_process(args.device)
    requests = _requests(args, lines, process, target)
    others = "replace" if args.force else "keep" if args.keep else "refuse"
    folder = ClipFolder(target, [request.clip for request in requests], others)  # type: ignore[arg-type]
    folder.check()
    try:
        made = _make(folder, requests, process)
    except KeyboardInterrupt:
        done = sum(folder.done(request.clip) for request in requests)
        folder.write_manifest()
        raise KeyboardInterrupt(
            f"{done} of {len(requests)} clips are in {target}; run the same command to go on"
        ) from None
    lines_written = folder.write_manifest()
    if process.shows:
        more = f", {lines_written - len(requests)} others" if lines_written > len(requests) else ""
        print(f"{target}: {len(requests)} clips{more}, {made} of them made now; {target / MANIFEST} says how")


def _requests(
    args: argparse.Namespace, lines: Sequence[argparse.Namespace], process: Process, target: Path
) -> list[ClipRequest]:
    """Everything that can be checked without the weights, for every clip."""
    source = models.resolve(args.model)
    pipeline_class = models.pipeline_class(source)
    video = pipeline_calls.makes_video(pipeline_class)
    kind = args.kind or ("gif" if video else "png")
    if not video and kind != "png":
        raise SkipError(f"{pipeline_class.__name__} makes pictures, not clips: leave --kind out")
    if kind == "mp4":
        from skipguide.media.movies import require_video

        require_video()
    defaults = source.defaults()
    dtype = models.choose_dtype(args.dtype, process.device, bundled=source.bundled)
    shared = {
        "model": source.content_hash(),
        "pipeline": pipeline_class.__name__,
        "dtype": dtype,
        "device": process.device.partition(":")[0],
        "versions": versions(),
    }
    requests: list[ClipRequest] = []
    seen: dict[str, int] = {}
    for number, own in enumerate(lines, 1):
        if own.no_guidance and (flags := given(own, GUIDANCE_FLAGS)):
            raise SkipError(f"--no-guidance leaves nothing for --{next(iter(flags))} to do: give one of them")
        call = pipeline_calls.call_arguments(pipeline_class, own, defaults)
        picture = call.pop("image", None)  # opened again when its turn comes: many would not fit into memory
        made_with = {
            "prompt": own.prompt,
            "seed": own.seed,
            "guidance": None if own.no_guidance else given(own, GUIDANCE_FLAGS) or "the model's preset",
            "call": call,
            "image": hashlib.sha256(picture.tobytes()).hexdigest() if picture is not None else None,
            "fps": own.fps,
            "zoom": own.zoom,
            **shared,
        }
        plain = json.loads(json.dumps(made_with, default=str))
        if (twin := seen.setdefault(json.dumps(plain, sort_keys=True), number)) != number:
            raise SkipError(
                f"clips {twin} and {number} of {args.prompts} are the same ({own.prompt!r}, seed {own.seed}): give one "
                f"of them another seed"
            )
        clip = Clip(f"{number:05d}-{slug(own.prompt, 40)}.{kind}", plain)
        job = ClipJob(own, source, pipeline_class, defaults, call, target / clip.file, process.device, dtype)
        requests.append(ClipRequest(clip, job))
    return requests


def _make(folder: ClipFolder, requests: Sequence[ClipRequest], process: Process) -> int:
    """Make what is missing; the weights are read when the first clip is.

    Returns:
        How many clips this process made.
    """
    from tqdm.auto import tqdm

    maker = _ClipMaker(folder, requests, process)
    with tqdm(total=len(requests), desc=folder.folder.name, unit="clip", disable=not process.shows) as progress:
        folder.locks.share(
            process.order(requests),
            name=lambda request: request.clip.stem,
            done=lambda request: folder.done(request.clip),
            make=partial(maker.make, progress.set_postfix_str),
            progress=lambda request: progress.update(),
        )
    return maker.made


class _ClipMaker:
    """Makes clips, with the pipeline that it loads for the first."""

    def __init__(self, folder: ClipFolder, requests: Sequence[ClipRequest], process: Process) -> None:
        self.folder = folder
        self.requests = requests
        self.process = process
        self.made = 0
        self._pipeline: Any = None
        self._written = time.monotonic()

    def make(self, show: Any, request: ClipRequest) -> None:
        """Make one clip; its lock is held."""
        pipeline = self._load()
        own, job = request.job.args, request.job
        show(own.prompt[:30])
        if own.image is not None:
            call = pipeline_calls.call_arguments(job.pipeline_class, own, job.defaults)
            job = replace(job, call=call)
        bar = {"leave": False, "position": 1, "disable": not self.process.shows}
        try:
            made = clip_job.make_clip(job, pipeline, self._settings(request), bar)
        except SkipError as error:
            raise SkipError(f"{request.clip.file}: {error}") from error
        self.folder.write(request.clip, made.save, made.notes)
        self.made += 1
        if time.monotonic() - self._written > MANIFEST_EVERY:
            self.folder.write_manifest()
            self._written = time.monotonic()

    def _load(self) -> Any:
        if self._pipeline is None:
            self._pipeline = self.requests[0].job.load(prompts=[request.job.args.prompt for request in self.requests])
            known: list[Mapping[str, Any]] = []
            for request in self.requests:
                if (settings := self._settings(request)) and settings not in known:
                    known.append(settings)
                    # a layer that does not exist is refused now, not after an hour
                    pipeline_calls.make_guidance(settings).cost(self._pipeline)
        return self._pipeline

    def _settings(self, request: ClipRequest) -> dict[str, Any]:
        own = request.job.args
        return {} if own.no_guidance else pipeline_calls.guidance_arguments(own, self._pipeline)
