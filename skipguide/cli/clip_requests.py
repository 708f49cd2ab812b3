"""Clips that are asked for, and what makes them: `generate --prompts` and `bench` share folders of them."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from skipguide.cli import clip_job, models, pipeline_calls
from skipguide.cli.clip_folder import Clip, ClipFolder
from skipguide.cli.clip_job import ClipJob
from skipguide.cli.outputs import versions
from skipguide.cli.processes import Process
from skipguide.errors import SkipError

MANIFEST_EVERY = 5.0  # seconds: how far the manifest of a running job may be behind


@dataclass(frozen=True)
class ClipModel:
    """What all clips of a job share: the model and what it runs on. No weights are read."""

    source: models.Source
    pipeline_class: type
    defaults: dict[str, Any]
    device: str
    dtype: str

    @classmethod
    def of(cls, name: str, device: str, dtype: str) -> ClipModel:
        """From what the user called the model, and the device that this process has."""
        source = models.resolve(name)
        pipeline_class = models.pipeline_class(source)
        precision = models.choose_dtype(dtype, device, bundled=source.bundled)
        return cls(source, pipeline_class, source.defaults(), device, precision)

    @property
    def video(self) -> bool:
        """Whether it makes clips rather than pictures."""
        return pipeline_calls.makes_video(self.pipeline_class)

    @cached_property
    def made_with(self) -> dict[str, Any]:
        """What every clip was made with."""
        return {
            "model": self.source.content_hash(),
            "pipeline": self.pipeline_class.__name__,
            "dtype": self.dtype,
            "device": self.device.partition(":")[0],
            "versions": versions(),
        }


@dataclass(frozen=True)
class ClipRequest:
    """One clip that is to be made: in which folder, how, and what for."""

    folder: ClipFolder
    clip: Clip
    job: ClipJob


def described(model: ClipModel, own: argparse.Namespace, guidance: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of the pipeline's call for one clip, without its picture, and everything that the clip depends on.

    Args:
        model: what makes it.
        own: the clip's arguments.
        guidance: of the clip, as plain data.

    Raises:
        SkipError: for arguments that the pipeline does not take.
    """
    call = pipeline_calls.call_arguments(model.pipeline_class, own, model.defaults)
    picture = call.pop("image", None)  # opened again when its turn comes: many would not fit into memory
    made_with = {
        "prompt": own.prompt,
        "seed": own.seed,
        "guidance": guidance,
        "call": call,
        "image": hashlib.sha256(picture.tobytes()).hexdigest() if picture is not None else None,
        "fps": own.fps,
        "zoom": own.zoom,
        **model.made_with,
    }
    return call, json.loads(json.dumps(made_with, default=str))


def job_of(model: ClipModel, own: argparse.Namespace, call: Mapping[str, Any], folder: ClipFolder, clip: Clip) -> Any:
    """What `ClipMaker` makes a clip from."""
    path = folder.folder / clip.file
    return ClipJob(own, model.source, model.pipeline_class, model.defaults, dict(call), path, model.device, model.dtype)


class ClipMaker:
    """Makes clips, with the pipeline that it loads for the first.

    Args:
        requests: all that may be asked for, for the vocabulary and to refuse what cannot be done before the first.
        process: which process this is.
    """

    def __init__(self, requests: Sequence[ClipRequest], process: Process) -> None:
        self.requests = requests
        self.process = process
        self.made = 0
        self._pipeline: Any = None
        self._written = time.monotonic()

    @property
    def pipeline(self) -> Any:
        """The pipeline; loaded when it is first asked for."""
        if self._pipeline is None:
            self._pipeline = self.requests[0].job.load(prompts=[request.job.args.prompt for request in self.requests])
            self.check(self.requests)
        return self._pipeline

    def check(self, requests: Sequence[ClipRequest]) -> None:
        """Refuse now what would be refused after an hour: a layer that does not exist."""
        known: list[Mapping[str, Any]] = []
        for request in requests:
            if (settings := self.settings(request)) and settings not in known:
                known.append(settings)
                pipeline_calls.make_guidance(settings).cost(self.pipeline)

    def settings(self, request: ClipRequest) -> dict[str, Any]:
        """The arguments of the guidance of a clip; empty for the plain pipeline."""
        own = request.job.args
        return {} if own.no_guidance else pipeline_calls.guidance_arguments(own, self.pipeline)

    def produce(self, request: ClipRequest, job: ClipJob, bar: Mapping[str, Any]) -> clip_job.MadeClip:
        """One clip in memory."""
        return clip_job.make_clip(job, self.pipeline, self.settings(request), bar)

    def make(self, show: Callable[[str], object], request: ClipRequest) -> None:
        """Make one clip; its lock is held."""
        own, job = request.job.args, request.job
        show(own.prompt[:30])
        if own.image is not None:
            call = pipeline_calls.call_arguments(job.pipeline_class, own, job.defaults)
            job = replace(job, call={**job.call, "image": call["image"]})
        bar = {"leave": False, "position": 1, "disable": not self.process.shows}
        try:
            made = self.produce(request, job, bar)
        except SkipError as error:
            raise SkipError(f"{request.clip.file}: {error}") from error
        request.folder.write(request.clip, made.save, made.notes)
        self.made += 1
        if time.monotonic() - self._written > MANIFEST_EVERY:
            request.folder.write_manifest()
            self._written = time.monotonic()
