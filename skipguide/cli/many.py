"""Many clips: `skipguide generate --prompts`, shared by as many processes as work on the folder."""

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

from skipguide.cli import jobs, models, sampling
from skipguide.cli.arguments import GUIDANCE_FLAGS, given
from skipguide.cli.clip_folder import MANIFEST, Clip, ClipFolder
from skipguide.cli.outputs import slug, versions
from skipguide.cli.processes import Place, here
from skipguide.cli.prompts import read_prompts
from skipguide.errors import SkipError

MANIFEST_EVERY = 5.0  # seconds: how far the manifest of a running job may be behind


@dataclass(frozen=True)
class Order:
    """One clip that is to be made: how, and what for."""

    clip: Clip
    job: jobs.Job


def run(args: argparse.Namespace) -> None:
    """Make the clips that are missing, together with the other processes."""
    if args.force and args.keep:
        raise SkipError("--force replaces clips that were made with other settings and --keep leaves them: give one")
    lines = read_prompts(args.prompts, args)
    target = args.output if args.output is not None else Path(f"{args.prompts.stem}-clips")
    place = here(args.device)
    orders = _orders(args, lines, place, target)
    others = "replace" if args.force else "keep" if args.keep else "refuse"
    folder = ClipFolder(target, [order.clip for order in orders], others)  # type: ignore[arg-type]
    folder.check()
    try:
        made = _make(folder, orders, place)
    except KeyboardInterrupt:
        done = sum(folder.done(order.clip) for order in orders)
        folder.write_manifest()
        raise KeyboardInterrupt(
            f"{done} of {len(orders)} clips are in {target}; run the same command to go on"
        ) from None
    lines_written = folder.write_manifest()
    if place.shows:
        more = f", {lines_written - len(orders)} others" if lines_written > len(orders) else ""
        print(f"{target}: {len(orders)} clips{more}, {made} of them made now; {target / MANIFEST} says how")


def _orders(args: argparse.Namespace, lines: Sequence[argparse.Namespace], place: Place, target: Path) -> list[Order]:
    """Everything that can be checked without the weights, for every clip."""
    source = models.resolve(args.model)
    pipeline_class = models.pipeline_class(source)
    video = sampling.makes_video(pipeline_class)
    kind = args.kind or ("gif" if video else "png")
    if not video and kind != "png":
        raise SkipError(f"{pipeline_class.__name__} makes pictures, not clips: leave --kind out")
    if kind == "mp4":
        from skipguide.media.movies import require_video

        require_video()
    defaults = source.defaults()
    dtype = models.choose_dtype(args.dtype, place.device, bundled=source.bundled)
    shared = {
        "model": source.content_hash(),
        "pipeline": pipeline_class.__name__,
        "dtype": dtype,
        "device": place.device.partition(":")[0],
        "versions": versions(),
    }
    orders: list[Order] = []
    seen: dict[str, int] = {}
    for number, own in enumerate(lines, 1):
        if own.no_guidance and (flags := given(own, GUIDANCE_FLAGS)):
            raise SkipError(f"--no-guidance leaves nothing for --{next(iter(flags))} to do: give one of them")
        call = sampling.call_arguments(pipeline_class, own, defaults)
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
        job = jobs.Job(own, source, pipeline_class, defaults, call, target / clip.file, place.device, dtype)
        orders.append(Order(clip, job))
    return orders


def _make(folder: ClipFolder, orders: Sequence[Order], place: Place) -> int:
    """Make what is missing; the weights are read when the first clip is.

    Returns:
        How many clips this process made.
    """
    from tqdm.auto import tqdm

    studio = _Studio(folder, orders, place)
    with tqdm(total=len(orders), desc=folder.folder.name, unit="clip", disable=not place.shows) as progress:
        folder.claims.share(
            place.order(orders),
            name=lambda order: order.clip.stem,
            done=lambda order: folder.done(order.clip),
            make=partial(studio.make, progress.set_postfix_str),
            progress=lambda order: progress.update(),
        )
    return studio.made


class _Studio:
    """Makes clips, with the pipeline that it loads for the first."""

    def __init__(self, folder: ClipFolder, orders: Sequence[Order], place: Place) -> None:
        self.folder = folder
        self.orders = orders
        self.place = place
        self.made = 0
        self._pipeline: Any = None
        self._written = time.monotonic()

    def make(self, show: Any, order: Order) -> None:
        """Make one clip; its claim is held."""
        pipeline = self._load()
        own, job = order.job.args, order.job
        show(own.prompt[:30])
        if own.image is not None:
            call = sampling.call_arguments(job.pipeline_class, own, job.defaults)
            job = replace(job, call=call)
        bar = {"leave": False, "position": 1, "disable": not self.place.shows}
        try:
            made = jobs.make(job, pipeline, self._settings(order), bar)
        except SkipError as error:
            raise SkipError(f"{order.clip.file}: {error}") from error
        self.folder.write(order.clip, made.save, made.notes)
        self.made += 1
        if time.monotonic() - self._written > MANIFEST_EVERY:
            self.folder.write_manifest()
            self._written = time.monotonic()

    def _load(self) -> Any:
        if self._pipeline is None:
            self._pipeline = self.orders[0].job.load(prompts=[order.job.args.prompt for order in self.orders])
            known: list[Mapping[str, Any]] = []
            for order in self.orders:
                if (settings := self._settings(order)) and settings not in known:
                    known.append(settings)
                    # a layer that does not exist is refused now, not after an hour
                    sampling.make_guidance(settings).cost(self._pipeline)
        return self._pipeline

    def _settings(self, order: Order) -> dict[str, Any]:
        own = order.job.args
        return {} if own.no_guidance else sampling.guidance_arguments(own, self._pipeline)
