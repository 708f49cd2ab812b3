"""Stack: the plans that hold in this thread or task, a frame each.

A `ContextVar` holds the active frames, so threads and async tasks with different plans do not see each other. A frame
maps modules to acts; an act is called instead of the module, and decides whether the module runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import RLock
from typing import TYPE_CHECKING, Any, Protocol

from skipguide.hosts.group_offload import SharedGroups
from skipguide.stats import Stats

if TYPE_CHECKING:
    from skipguide.gate import Gate

Call = Callable[..., Any]


class Act(Protocol):
    """What happens at a gate while a frame is active; `call` is the module, or the next act around it."""

    def __call__(self, frame: Frame, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the module would have returned."""


class Frame:
    """One plan on one model: the acts by module, the ledger, and what is known of the running pass.

    Attributes:
        batch: rows of the running pass of the model; 0 when none is running.
        rows: the model's rows that reach the module now running, where an act took some out; None is all of them.
        seen: the gates that were called in this pass.
        groups: offloaded groups of several blocks, in the running pass.
        live: whether somebody is inside the plan's `with` block. A task that outlives the block sees that it ended.
        busy: whether a pass of the model runs on this frame.
    """

    __slots__ = ("acts", "batch", "busy", "entered", "groups", "live", "names", "root", "rows", "seen", "stats")

    def __init__(self, root: Gate | None, stats: Stats) -> None:
        self.root = root
        self.stats = stats
        self.acts: dict[int, Act] = {}
        self.names: dict[int, str] = {}
        self.batch = 0
        self.rows: tuple[int, ...] | None = None
        self.seen: set[int] = set()
        self.groups: SharedGroups | None = None
        self.entered = 0
        self.live = False
        self.busy = False

    @property
    def present(self) -> int:
        """How many batch rows reach the module now running."""
        return self.batch if self.rows is None else len(self.rows)

    def enter(self) -> None:
        """Put the frame on the stack of this thread or task."""
        self._count(1)
        _set_stack((*_ENTERED.get(), self))

    def leave(self) -> None:
        """Take this frame off the stack once, wherever in the stack it is."""
        self._count(-1)
        stack = list(_ENTERED.get())
        if self in stack:
            stack.reverse()
            stack.remove(self)
            stack.reverse()
        _set_stack(tuple(stack))

    @contextmanager
    def passing(self) -> Iterator[Frame]:
        """A pass of the model: this frame, or another of its plan while a pass runs on it already.

        asyncio.to_thread and thread pools of servers hand the context on, with the frames that were entered; and a
        model may call itself.
        """
        with _LOCK:
            busy, self.busy = self.busy, True
        if busy:
            with self._replaced() as other:
                yield other
            return
        try:
            yield self
        finally:
            self.batch = 0
            self.seen.clear()
            self.busy = False

    @contextmanager
    def _replaced(self) -> Iterator[Frame]:
        """Another frame of the plan on the stack of this thread or task, in this one's place."""
        other = Frame(self.root, self.stats)
        other.acts, other.names, other.live = self.acts, self.names, self.live
        before = _ENTERED.get()
        _set_stack(tuple(other if frame is self else frame for frame in before))
        try:
            yield other
        finally:
            _set_stack(before)

    def _count(self, change: int) -> None:
        with _LOCK:
            self.entered += change
            self.live = self.entered > 0

    def saw(self, gate: Gate) -> None:
        """Note that a gate was called, and notice when the model's own was not."""
        if not self.batch and self.root is not None and gate is not self.root and not self.root.reachable():
            raise self.root.lost()
        self.seen.add(gate.key)

    def close(self) -> None:
        """End the plan for good and let go of the model: its Skipper is gone."""
        self.live = False
        self.root = None
        self.acts.clear()
        _set_stack(tuple(other for other in _ENTERED.get() if other is not self))


_LOCK = RLock()

# Both are tuples, so that a thread or task never sees another's change. A frame can be entered more than once; the
# gates read each once.
_ENTERED: ContextVar[tuple[Frame, ...]] = ContextVar("skipguide_entered_frames", default=())
_ACTIVE: ContextVar[tuple[Frame, ...]] = ContextVar("skipguide_active_frames", default=())


def _set_stack(stack: tuple[Frame, ...]) -> None:
    _ENTERED.set(stack)
    _ACTIVE.set(tuple(dict.fromkeys(stack)))


@contextmanager
def without(frame: Frame) -> Iterator[None]:
    """This thread or task without one of its frames, for a while; the plan goes on everywhere else."""
    before = _ENTERED.get()
    _set_stack(tuple(other for other in before if other is not frame))
    try:
        yield
    finally:
        _set_stack(before)


def active_frames() -> tuple[Frame, ...]:
    """The frames of this thread or task, outermost first."""
    return _ACTIVE.get()
