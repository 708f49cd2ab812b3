"""Active plans: which plans hold, here or everywhere, and what is known of the pass that runs under each.

A plan holds *here*, in the thread or task that entered it (a `ContextVar` keeps them, so threads and async servers do
not see each other's), or *everywhere*, in all threads, at one gate. It maps gates to interventions; an intervention is
called instead of the module, and decides whether the module runs.

Ctrl-C can come between any two lines. So whatever holds is undone by an operation that can be repeated, from wherever
the first attempt was broken off, and what a broken-off pass left behind is put right when the next one begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from threading import RLock
from typing import Any, Protocol, TypeVar
from weakref import ref

from skipguide.errors import LostGateError
from skipguide.hosts.group_offload import SharedGroups
from skipguide.stats import Stats

Call = Callable[..., Any]
T = TypeVar("T")


class Gated(Protocol):
    """What an active plan needs of a gate."""

    key: int
    everywhere: tuple[ActivePlan, ...]

    def reachable(self) -> bool:
        """Whether calls of the module still reach it."""

    def lost(self, name: str = "") -> LostGateError:
        """The error if they do not."""


class Intervention(Protocol):
    """What happens at a gate while a plan is active; `call` is the module, or the next intervention around it."""

    def __call__(self, plan: ActivePlan, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the module would have returned."""


class ActivePlan:
    """One plan on one model: the interventions by gate, the ledger, and what is known of the running pass.

    It refers to no module: a plan that stays entered does not keep its model alive.

    Attributes:
        interventions: gate key -> what happens there.
        names: gate key -> name in the ledger.
        holds: condition -> whether it is met in the running pass (see `When`).
        batch: rows of the running pass of the model; 0 when none is running.
        rows: the model's rows that reach the module now running, where an intervention took some out; None is all.
        seen: the gates that were called in this pass.
        repeated: those that were called again, while something was to happen there.
        left_out: how many modules were left out in this pass.
        groups: offloaded groups of several blocks, in the running pass.
        grid: frames, height and width of the image's tokens in the running pass; None where nobody needs them.
        counts_calls: whether every call is entered in the ledger; else the root intervention enters whole passes.
        state: what else the root intervention keeps of the running pass.
        entries: one for each time that somebody is inside the plan's `with` block, in whatever thread.
        live: whether there is any. A task that outlives the block sees that it ended.
        closed: whether it ended for good.
        running: the pass that runs on this object, by its token; None without one.
        follow: called at gates with the plans that hold, in passes with gradients: a checkpoint may run them again.
        renew: makes the interventions of a second pass at the same time, where they keep something of a pass; None:
            passes share them.
    """

    __slots__ = (
        *(
            "__weakref__",
            "_root",
            "batch",
            "closed",
            "entries",
            "follow",
            "grid",
            "groups",
            "holds",
            "interventions",
            "left_out",
            "live",
        ),
        *("counts_calls", "names", "renew", "repeated", "rows", "running", "seen", "state", "stats"),
    )

    def __init__(self, root: Gated | None, stats: Stats) -> None:
        self._root = None if root is None else ref(root)
        self.stats = stats
        self.interventions: dict[int, Intervention] = {}
        self.names: dict[int, str] = {}
        self.holds: dict[str, bool] = {}
        self.batch = 0
        self.rows: tuple[int, ...] | None = None
        self.seen: set[int] = set()
        self.repeated: set[int] = set()
        self.left_out = 0
        self.groups: SharedGroups | None = None
        self.grid: tuple[int, int, int] | None = None
        self.counts_calls = True
        self.state: Any = None
        self.entries: set[Entry] = set()
        self.follow: Callable[[tuple[ActivePlan, ...]], None] | None = None
        self.live = self.closed = False
        self.running: object = None
        self.renew: Callable[[], dict[int, Intervention]] | None = None

    @property
    def root(self) -> Gated | None:
        """The model's own gate; None if it is gone, or the plan was closed."""
        return None if self._root is None else self._root()

    @property
    def present(self) -> int:
        """How many batch rows reach the module now running."""
        return self.batch if self.rows is None else len(self.rows)

    def skipped(self, name: str, count: int = 1) -> None:
        """Enter in the ledger that a module was left out.

        Args:
            name: the module, as the ledger calls it.
            count: for how many left-out modules of the plan it stands.
        """
        self.left_out += count
        if self.counts_calls:
            self.stats.skipped(name, self.present)

    # -- here ---------------------------------------------------------------------------------------------------

    def enter(self) -> Entry:
        """Hold in this thread or task, until the entry that is given leaves."""
        entry = Entry(self)
        entry.enter()
        return entry

    def leave(self) -> None:
        """Take back the last `enter` of this plan here, or else one of another thread, whatever was entered since."""
        if (entry := self.last_entry()) is not None:
            entry.leave()

    def leave_all(self) -> None:
        """Take back every `enter` of this plan in this thread or task; nothing happens without one."""
        for entry in [entry for entry in _ENTERED.get() if entry.plan is self]:
            entry.leave()
        if self in ACTIVE.get():  # an interrupt came between the two of `_set_entered`
            _set_entered(_ENTERED.get())

    def last_entry(self) -> Entry | None:
        """The entry that `leave` takes back."""
        here = [entry for entry in _ENTERED.get() if entry.plan is self]
        return here[-1] if here else next(iter(self.entries), None)

    # -- a pass of the model ------------------------------------------------------------------------------------

    def begin(self, token: object) -> ActivePlan:
        """Begin a pass: on this object, or on another one while a pass runs on it already.

        That happens because asyncio.to_thread and thread pools of servers hand the context on, with the plans that
        were entered, and because a model may call itself. It also happens after a pass whose end was interrupted.
        """
        with LOCK:
            if self.running is None:
                self.running = token
        if self.running is not token:
            other = self.again()
            entries = (Entry(other, entry, token) if entry.plan is self else entry for entry in _ENTERED.get())
            _set_entered(tuple(entries))
            return other
        self.rows = None
        self.seen.clear()
        self.repeated.clear()
        return self

    def finish(self, token: object) -> None:
        """End a pass; it can be repeated, and nothing happens to a pass of another token."""
        if self.running is token:
            self.batch = self.left_out = 0
            self.seen.clear()
            self.rows = self.state = self.follow = self.running = None
        elif any(entry.token is token for entry in _ENTERED.get()):
            _set_entered(tuple(entry.instead_of or entry for entry in _ENTERED.get()))

    def snapshot(self) -> ActivePlan:
        """The plan as it is at this point of the running pass, for good, with a ledger of its own."""
        other = self.again()
        other.stats, other.live = Stats(), True
        other.holds, other.batch, other.rows, other.state = dict(self.holds), self.batch, self.rows, self.state
        other.grid = self.grid
        return other

    def again(self) -> ActivePlan:
        """Another object for the same plan, for a pass at the same time."""
        other = ActivePlan(None, self.stats)
        other._root, other.names, other.holds, other.live = self._root, self.names, self.holds, self.live
        other.counts_calls = self.counts_calls
        other.interventions = self.interventions if self.renew is None else self.renew()
        return other

    def note_outside(self, gate: Gated) -> None:
        """A gate was called outside a pass of the model: notice if the model's own gate is not called any more.

        Raises:
            LostGateError: if it was replaced.
        """
        root = self.root
        if root is not None and root is not gate and not root.reachable():
            raise root.lost()

    def close(self) -> None:
        """End the plan for good, where its handle or its model is gone and `leave` will not be called."""
        self.abandon()
        _set_entered(_ENTERED.get())

    def abandon(self) -> None:
        """Close the plan where a finalizer asks for it: what is entered here is not changed before somebody looks.

        The garbage collector calls finalizers at any allocation, before Python 3.12 even in the middle of a
        `ContextVar.set`, of ours or of another library. A second `set` frees what the first one works on, and later
        the process crashes or reads another object's memory (python/cpython, issue 148891).
        """
        self.live, self.closed = False, True
        self._root = None
        self.interventions = {}


class Entry:
    """One time that a plan was entered, in one thread or task. Entering and leaving can be repeated.

    Args:
        plan: the plan.
        instead_of: the entry that this one replaces for one pass of the model.
        token: of that pass.
    """

    __slots__ = ("instead_of", "plan", "token")

    def __init__(self, plan: ActivePlan, instead_of: Entry | None = None, token: object = None) -> None:
        self.plan = plan
        self.instead_of = instead_of
        self.token = token

    def enter(self) -> None:
        """Hold the plan in this thread or task."""
        with LOCK:
            self.plan.entries.add(self)
            self.plan.live = True
        if self not in (entered := _ENTERED.get()):
            _set_entered((*entered, self))

    def leave(self) -> None:
        """Hold it no longer, whatever was entered since."""
        with LOCK:
            self.plan.entries.discard(self)
            self.plan.live = bool(self.plan.entries)
        _set_entered(tuple(entry for entry in _ENTERED.get() if self not in (entry, entry.instead_of)))


# of everything that is known in all threads: the entries of a plan, and what stands at a gate everywhere
LOCK = RLock()

# Both are tuples, so that a thread or task never sees another's change. A plan can be entered more than once; the gates
# read each once.
_ENTERED: ContextVar[tuple[Entry, ...]] = ContextVar("skipguide_entered_plans", default=())
ACTIVE: ContextVar[tuple[ActivePlan, ...]] = ContextVar("skipguide_active_plans", default=())


def _set_entered(entries: tuple[Entry, ...]) -> None:
    """Set both, without closed plans; whoever sets them next puts an interrupt between them right.

    No finalizer may come here: see `ActivePlan.abandon`.
    """
    entries = tuple(entry for entry in entries if not entry.plan.closed)
    _ENTERED.set(entries)
    ACTIVE.set(tuple(dict.fromkeys(entry.plan for entry in entries)))


def active_plans() -> tuple[ActivePlan, ...]:
    """The plans that hold in this thread or task, outermost first."""
    plans = ACTIVE.get()
    if any(plan.closed for plan in plans):
        _set_entered(_ENTERED.get())
        plans = ACTIVE.get()
    return plans


def active_at(gate: Gated, kind: type[T]) -> tuple[ActivePlan, T] | None:
    """The plan that holds here with an intervention of this kind at a gate, and that intervention; None without one."""
    for plan in ACTIVE.get():
        found = plan.interventions.get(gate.key)
        if plan.live and isinstance(found, kind):
            return plan, found
    return None


@contextmanager
def hold_only(plans: Sequence[ActivePlan]) -> Iterator[None]:
    """Inside, these plans hold in this thread or task, and no others."""
    before = _ENTERED.get()
    try:
        _set_entered(tuple(Entry(plan) for plan in plans))
        yield
    finally:
        try:
            _set_entered(before)
        except BaseException:  # Ctrl-C: what was broken off is done again
            _set_entered(before)
            raise


# -- everywhere -------------------------------------------------------------------------------------------------------


def hold_everywhere(gate: Gated, intervention: Intervention) -> ActivePlan:
    """A plan with one intervention that holds in all threads, around all others at its gate; `end_everywhere` ends it.

    Args:
        gate: where; it must be installed.
        intervention: what happens there.
    """
    plan = ActivePlan(gate, Stats())
    plan.interventions[gate.key] = intervention
    plan.live = True
    _change_everywhere(gate, lambda plans: (*plans, plan))
    return plan


def end_everywhere(gate: Gated, intervention: Intervention) -> None:
    """End what `hold_everywhere` began; nothing happens where it has ended already."""
    _change_everywhere(
        gate, lambda plans: tuple(plan for plan in plans if plan.interventions.get(gate.key) is not intervention)
    )


def everywhere_at(gate: Gated, kind: type[T]) -> list[T]:
    """The interventions of a kind that hold in all threads at a gate."""
    return [found for plan in gate.everywhere if isinstance(found := plan.interventions.get(gate.key), kind)]


def _change_everywhere(gate: Gated, change: Callable[[tuple[ActivePlan, ...]], tuple[ActivePlan, ...]]) -> None:
    """The one place that changes what stands at a gate in all threads."""
    with LOCK:
        gate.everywhere = change(gate.everywhere)
