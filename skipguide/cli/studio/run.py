"""Run: work in a thread of its own that says how far it is, and that can be stopped between two steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Step = tuple[int, int]  # done, of how many
_PAUSE = 0.1  # seconds between two looks at whether it was stopped


class Stopped(Exception):  # noqa: N818  (nothing went wrong: somebody pressed a button)
    """The work was stopped."""


class Run(Generic[T]):
    """One piece of work.

    Args:
        work: called in a thread with a function that it tells its steps to; that function raises `Stopped` once the run
            was stopped.
    """

    def __init__(self, work: Callable[[Callable[[int, int], None]], T]) -> None:
        self._work = work
        self._said: SimpleQueue[Step | None] = SimpleQueue()
        self._stop = threading.Event()
        self._result: list[T] = []
        self._error: BaseException | None = None

    def stop(self) -> None:
        """Let it end at its next step."""
        self._stop.set()

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stop.is_set()

    def steps(self) -> Iterator[Step]:
        """Start, and yield the steps until it has ended.

        Raises:
            Stopped: if it was stopped.
            BaseException: what the work raised.
        """
        thread = threading.Thread(target=self._run, name="skipguide-studio", daemon=True)
        thread.start()
        try:
            while (step := self._next()) is not None:
                yield step
        finally:  # the page was closed: nobody waits for the result
            if thread.is_alive():
                self.stop()
            thread.join()
        if self._error is not None:
            raise self._error

    @property
    def result(self) -> T:
        """What the work returned, once `steps` has ended."""
        return self._result[0]

    def _next(self) -> Step | None:
        while True:
            try:
                return self._said.get(timeout=_PAUSE)
            except Empty:
                continue

    def _tell(self, done: int, total: int) -> None:
        if self.stopped:
            raise Stopped
        self._said.put((done, total))

    def _run(self) -> None:
        try:
            self._result.append(self._work(self._tell))
        except BaseException as error:
            self._error = error
        finally:
            self._said.put(None)


class Runs:
    """The run of every visitor: one at a time for each, known by the visitor's session."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, Run[Any]] = {}

    def start(self, session: str, run: Run[T]) -> Run[T]:
        """Enter a visitor's run; an earlier one is stopped."""
        with self._lock:
            before, self._running[session] = self._running.get(session), run
        if before is not None:
            before.stop()
        return run

    def stop(self, session: str) -> bool:
        """Stop a visitor's run; whether there was one."""
        with self._lock:
            run = self._running.pop(session, None)
        if run is not None:
            run.stop()
        return run is not None

    def end(self, session: str, run: Run[Any]) -> None:
        """A run has ended."""
        with self._lock:
            if self._running.get(session) is run:
                del self._running[session]
