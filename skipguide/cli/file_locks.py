"""File locks: which process makes what, when several work on one folder.

The operating system holds the lock for a process (flock, through the filelock package), on an empty file in a hidden
folder next to the results. A process that gets a lock checks once more whether the work is done.

Why locks: they end with their process, also after SIGKILL or a crash. So no lock can be stale, and none has to be
judged by process numbers, clocks or heartbeats. A process that waits takes over the work of one that died. Processes
may come and go, with `accelerate launch` or without, on one machine or on several with a shared folder (NFS passes
flock on to the server). A slow clip does not hold up the others, as a split by rank would.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from time import sleep
from typing import TypeVar

from skipguide.errors import SkipError
from skipguide.files import fitting, landing, temporary_stem

FOLDER = ".claims"  # what the folder has always been called: old and new processes share it
PAUSE = 0.2  # seconds between two looks at what the other processes are making

T = TypeVar("T")


class FolderLocks:
    """The locks on one folder's files.

    Example:
        >>> import tempfile
        >>> locks = FolderLocks(Path(tempfile.mkdtemp()))
        >>> with locks.hold("00001") as mine:
        ...     mine
        True
    """

    def __init__(self, folder: Path) -> None:
        self.folder = landing(folder) / FOLDER

    @contextmanager
    def hold(self, name: str, *, wait: bool = False) -> Iterator[bool]:
        """Hold the lock on `name` inside the block.

        Args:
            name: of what is made.
            wait: until another process lets go of it (or dies); otherwise the block is entered with False.
        """
        from filelock import FileLock, Timeout

        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / fitting(name, ".lock"), timeout=-1 if wait else 0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        except NotImplementedError as error:
            raise SkipError(f"{self.folder} lies on a file system without locks, which sharing work needs") from error
        try:
            yield True
        finally:
            lock.release()

    def share(
        self,
        work: Iterable[T],
        name: Callable[[T], str],
        done: Callable[[T], bool],
        make: Callable[[T], object],
        progress: Callable[[T], object] = lambda item: None,
    ) -> None:
        """Do what is not done, together with the other processes that work on the folder; return when all is done.

        Args:
            work: in the order to try.
            name: of one item's lock.
            done: whether an item is finished; asked again when its lock is held.
            make: finishes an item.
            progress: told of every item that was found finished or was finished here.
        """
        pending = list(work)
        while pending:
            left = []
            for item in pending:
                if not done(item):
                    with self.hold(name(item)) as mine:
                        if not mine:
                            left.append(item)
                            continue
                        if not done(item):
                            make(item)
                progress(item)
            if len(left) == len(pending):
                sleep(PAUSE)
            pending = left


def remove_leftovers(folder: Path, stem: str) -> None:
    """Remove the temporary files that killed processes left of one result; its lock must be held.

    Args:
        folder: where the result lies.
        stem: its name without the suffix; notes next to it are covered.
    """
    stem = temporary_stem(stem)
    leftover = re.compile(rf"\.{re.escape(stem)}(\.\w+)?\.[0-9a-f]{{8}}\.\w+")  # as `replacing` names them
    for path in folder.glob(f".{escape(stem)}.*"):
        if leftover.fullmatch(path.name):
            path.unlink(missing_ok=True)
