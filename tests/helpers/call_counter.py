"""Counts Python calls into files of the library: exact, so that a test can hold a limit on them."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from helpers.import_graph import FOLDERS, ROOT


class CallCounter:
    """Counts the calls into the library inside the `with` block; generators count each time that they go on.

    Attributes:
        calls: (file, function) -> how many times it was called.
    """

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        self._inside: dict[str, str] = {}  # file as the code names it -> its path from the root; empty for others'

    @property
    def total(self) -> int:
        """All calls."""
        return self.calls.total()

    def _seen(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        if (place := self._inside.get(code.co_filename)) is None:
            place = self._inside[code.co_filename] = _from_root(code.co_filename)
        if place:
            self.calls[place, code.co_qualname] += 1

    def __enter__(self) -> Self:
        sys.setprofile(self._seen)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        sys.setprofile(None)


def _from_root(filename: str) -> str:
    path = Path(filename).resolve()  # pipelines and vision are imported through links
    inside = any(path.is_relative_to(folder) for folder in FOLDERS.values())
    return str(path.relative_to(ROOT)) if inside else ""
