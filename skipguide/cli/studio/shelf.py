"""Shelf: loaded models, shared by all visitors; each is used by one at a time."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_PAUSE = 0.2  # seconds between two looks at whether somebody still waits


@dataclass
class Loaded(Generic[T]):
    """A model, and who may use it now."""

    model: T
    lock: threading.Lock = field(default_factory=threading.Lock)


class Shelf(Generic[T]):
    """The models that were used last.

    Args:
        load: from a name to a model.
        room: how many are kept.
    """

    def __init__(self, load: Callable[[str], T], room: int = 2) -> None:
        self._load, self._room = load, room
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Loaded[T]] = OrderedDict()

    @contextmanager
    def using(self, name: str, waiting: Callable[[], Any] = lambda: None) -> Iterator[T]:
        """A model for one visitor alone; others wait.

        Args:
            name: of the model.
            waiting: called now and then while somebody else uses it; may raise.
        """
        with self._lock:  # one is read at a time, too: two visitors who ask for it share it
            found = self._kept.pop(name, None) or Loaded(self._load(name))
            self._kept[name] = found
            while len(self._kept) > self._room:
                self._kept.popitem(last=False)
        while not found.lock.acquire(timeout=_PAUSE):
            waiting()
        try:
            yield found.model
        finally:
            found.lock.release()
