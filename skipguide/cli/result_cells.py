"""Results that several processes work out between them, each once: a JSON file per result in a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from skipguide.cli.clip_folder import differences
from skipguide.cli.file_locks import FolderLocks, remove_leftovers
from skipguide.cli.outputs import read_json, replacing, slug, write_json
from skipguide.cli.processes import Process
from skipguide.errors import SkipError
from skipguide.files import landing
from skipguide.hosts.progress import progress_bar

T = TypeVar("T")
Result = dict[str, Any]
PLAN = "plan.json"


class ResultCells:
    """Finished results in a folder; an interrupted run goes on where it stopped.

    Args:
        folder: need not exist.
        process: which process this is.
    """

    def __init__(self, folder: Path, process: Process) -> None:
        self.folder = folder
        self.process = process
        self.locks = FolderLocks(folder)

    def get(self, name: str, depends: Mapping[str, Any]) -> Result | None:
        """A finished result; None if there is none of these settings."""
        found = read_json(self._path(name))
        if found is None or found.get("depends") != _hash(depends) or not isinstance(found.get("result"), dict):
            return None
        result: Result = found["result"]
        return result

    def once(self, name: str, depends: Mapping[str, Any], make: Callable[[], Result]) -> Result:
        """A result that this process makes, or waits for.

        Args:
            name: of the result.
            depends: everything that it depends on; with something else it is made anew.
            make: works it out.
        """
        with self.locks.hold(slug(name), wait=True):
            if (found := self.get(name, depends)) is not None:
                return found
            return self._put(name, depends, make())

    def all(
        self,
        items: Sequence[T],
        name: Callable[[T], str],
        depends: Callable[[T], Mapping[str, Any]],
        make: Callable[[T], Result],
        what: str,
    ) -> list[Result]:
        """The results of all items, in their order; this process makes those that nobody else does."""
        with progress_bar(what=what, total=len(items), unit=what, show=self.process.shows, leave=True) as progress:
            self.locks.share(
                self.process.order(items),
                name=lambda item: slug(name(item)),
                done=lambda item: self.get(name(item), depends(item)) is not None,
                make=lambda item: self._put(name(item), depends(item), make(item)),
                progress=lambda item: progress.update(),
            )
        found = [self.get(name(item), depends(item)) for item in items]
        if (missing := next((name(item) for item, own in zip(items, found, strict=True) if own is None), None)) is None:
            return [own for own in found if own is not None]
        raise SkipError(f"the result {missing!r} was removed from {self.folder} while others were made: run it again")

    def _path(self, name: str) -> Path:
        return self.folder / f"{slug(name)}.json"

    def _put(self, name: str, depends: Mapping[str, Any], result: Result) -> Result:
        remove_leftovers(self.folder, slug(name))
        with replacing(self._path(name)) as (file,):
            write_json(file, {"name": name, "depends": _hash(depends), "result": result})
        found = self.get(name, depends)  # as every other process reads it
        assert found is not None
        return found


def open_plan(folder: Path, plan: Mapping[str, Any], *, force: bool) -> None:
    """Begin a folder with what it is for, or go on with one that is for the same.

    Args:
        folder: need not exist.
        plan: everything that was asked for, as plain data.
        force: replace what is there.

    Raises:
        SkipError: for a folder of something else, or of another plan.
    """
    path = folder / PLAN
    plain = json.loads(json.dumps(dict(plan), default=str))
    if folder.exists() and not folder.is_dir():
        raise SkipError(f"{folder} is a file; expected a folder for the results")
    with FolderLocks(folder).hold("plan", wait=True):
        found = read_json(path)
        if found == plain:
            return
        if found is not None and not force:
            raise SkipError(
                f"{folder} has results of other settings: {differences(found, plain)}. Choose another folder with -o, "
                f"or replace them with --force"
            )
        if found is None and not force and (strange := _strange(folder)):
            raise SkipError(
                f"{folder} is not empty ({strange}) and no folder of results: choose another one with -o, or "
                f"write into it with --force"
            )
        remove_leftovers(folder, path.stem)
        with replacing(path) as (file,):
            write_json(file, plain)


def _strange(folder: Path) -> str:
    """A file that an empty folder would not have; what is hidden are locks, and what a killed process left."""
    place = landing(folder)
    names = sorted(path.name for path in place.iterdir()) if place.is_dir() else []
    return next((name for name in names if not name.startswith(".")), "")


def _hash(depends: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(depends, sort_keys=True, default=str).encode()).hexdigest()[:32]
