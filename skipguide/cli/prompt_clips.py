"""The clips of a file of prompts: `skipguide generate --prompts`, shared by the processes that work on one folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from skipguide.cli.arguments import GUIDANCE_FLAGS, given
from skipguide.cli.clip_folder import MANIFEST, Clip, ClipFolder
from skipguide.cli.clip_requests import ClipMaker, ClipModel, ClipRequest, described, job_of
from skipguide.cli.outputs import slug
from skipguide.cli.processes import Process, this_process
from skipguide.cli.prompts import read_prompts
from skipguide.errors import SkipError
from skipguide.hosts.progress import progress_bar, say


def run(args: argparse.Namespace) -> None:
    """Make the clips that are missing, together with the other processes."""
    if args.force and args.keep:
        raise SkipError("--force replaces clips that were made with other settings and --keep leaves them: give one")
    lines = read_prompts(args.prompts, args)
    target = args.output if args.output is not None else Path(f"{args.prompts.stem}-clips")
    process = this_process(args.device)
    others = "replace" if args.force else "keep" if args.keep else "refuse"
    folder = ClipFolder(target, [], others)  # type: ignore[arg-type]
    requests = _requests(args, lines, process, folder)
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
    args: argparse.Namespace, lines: Sequence[argparse.Namespace], process: Process, folder: ClipFolder
) -> list[ClipRequest]:
    """Everything that can be checked without the weights, for every clip."""
    model = ClipModel.of(args.model, process.device, args.dtype)
    kind = args.kind or ("gif" if model.video else "png")
    if not model.video and kind != "png":
        raise SkipError(f"{model.pipeline_class.__name__} makes pictures, not clips: leave --kind out")
    if kind == "mp4":
        from skipguide.media.movies import require_video

        require_video()
    requests: list[ClipRequest] = []
    seen: dict[str, int] = {}
    for number, own in enumerate(lines, 1):
        if own.no_guidance and (flags := given(own, GUIDANCE_FLAGS)):
            raise SkipError(f"--no-guidance leaves nothing for --{next(iter(flags))} to do: give one of them")
        guidance = None if own.no_guidance else given(own, GUIDANCE_FLAGS) or "the model's preset"
        call, plain = described(model, own, guidance)
        if (twin := seen.setdefault(json.dumps(plain, sort_keys=True), number)) != number:
            raise SkipError(
                f"clips {twin} and {number} of {args.prompts} are the same ({own.prompt!r}, seed {own.seed}): give one "
                f"of them another seed"
            )
        clip = Clip(f"{number:05d}-{slug(own.prompt, 40)}.{kind}", plain)
        requests.append(ClipRequest(folder, clip, job_of(model, own, call, folder, clip)))
    folder.clips = [request.clip for request in requests]
    return requests


def _make(folder: ClipFolder, requests: Sequence[ClipRequest], process: Process) -> int:
    """Make what is missing; the weights are read when the first clip is.

    Returns:
        How many clips this process made.
    """
    maker = ClipMaker(requests, process)
    bar = progress_bar(what=folder.folder.name, total=len(requests), unit="clip", show=process.shows, leave=True)
    with bar as progress:
        folder.locks.share(
            process.order(requests),
            name=lambda request: request.clip.stem,
            done=lambda request: folder.done(request.clip),
            make=partial(maker.make, partial(say, progress)),
            progress=lambda request: progress.update(),
        )
    return maker.made
