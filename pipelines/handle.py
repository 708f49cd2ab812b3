"""Handle: the life of what is in force on a pipeline's denoisers, from `apply` to `remove` or the end of a block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self

from skipguide.errors import SkipError


class Standing(Protocol):
    """What stands at one denoiser."""

    handle: Any

    def install(self) -> None:
        """Put it in place."""

    def remove(self) -> None:
        """Take it away again."""


class PipelineHandle:
    """What `apply(pipe)` returns: a context manager with `remove()`, after which nothing is left on the pipeline."""

    _name = "this"  # for the error of a handle that is used again

    def _hold(self, pipe: Any, parts: Sequence[Standing]) -> None:
        """Take the parts, one for each denoiser of the pipeline; each of them can be asked for its handle."""
        self._pipe = pipe
        self._parts = tuple(parts)
        for part in self._parts:
            part.handle = self
        self._installed: list[Any] = []

    @property
    def pipe(self) -> Any:
        """The pipeline; None after `remove()`."""
        return self._pipe

    @property
    def _where(self) -> str:
        """Where it is in force, in words."""
        return f"on {type(self._pipe).__name__}" if self._installed else "removed"

    def _install(self) -> None:
        try:
            for part in self._parts:
                self._installed.append(part)  # first: what was not installed can be removed too
                part.install()
        except BaseException:
            self._forget()
            self.remove()
            raise

    def _forget(self) -> None:
        """Let go of notes about a run that failed: the error that is on its way says more."""

    def remove(self) -> None:
        """End it; nothing of it is left on the pipeline. A second call does nothing."""
        while self._installed:
            self._installed[-1].remove()
            self._installed.pop()
        # somebody may keep the handle for its stats: it must not keep the pipeline's weights in memory
        self._parts, self._pipe = (), None

    def __enter__(self) -> Self:
        """Return the handle.

        Raises:
            SkipError: if it was removed before: the block would silently run without it.
        """
        if not self._installed:
            raise SkipError(f"{self._name} was removed: call apply(pipe) again for a new handle")
        return self
