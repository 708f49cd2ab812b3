"""Active plans: which hold here, whatever ends first, and on whose object a pass runs."""

import contextlib
import contextvars
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from skipguide import LostGateError, active
from skipguide.active import ActivePlan, active_plans
from skipguide.gate import gate_of
from skipguide.stats import Stats


@pytest.fixture
def frames():
    assert active_plans() == ()
    made = [ActivePlan(None, Stats()) for _ in range(3)]
    yield made
    for frame in made:
        frame.close()


@contextlib.contextmanager
def passing(plan):
    """A pass of the model."""
    token = object()
    try:
        yield plan.begin(token)
    finally:
        plan.finish(token)


def elsewhere(function):
    """In another thread with a copy of this context, as asyncio.to_thread hands it on."""
    found, context = [], contextvars.copy_context()
    thread = threading.Thread(target=lambda: found.append(context.run(function)))
    thread.start()
    thread.join(600)
    return found[0]


def test_entered_twice_is_read_once_and_left_from_the_inside(frames):
    one, two, _ = frames
    for frame in (one, two, one):
        frame.enter()
    assert active_plans() == (one, two)
    one.leave()
    assert active_plans() == (one, two), "the inner entry was left: the order is that of the outer one"
    assert one.live
    one.leave()
    assert active_plans() == (two,) and not one.live and two.live
    two.leave()
    assert active_plans() == () and not two.live


def test_the_outer_one_may_end_first(frames):
    one, two, three = frames
    for frame in frames:
        frame.enter()
    two.leave()
    assert active_plans() == (one, three)
    three.leave()
    one.leave()
    assert active_plans() == ()


def test_left_in_a_thread_that_had_not_entered(frames):
    one = frames[0]
    one.enter()
    assert plans_of_a_thread() == ()
    elsewhere(one.leave)
    assert not one.live and active_plans() == (one,), "the stack is this thread's; that the plan ended is everybody's"


def plans_of_a_thread():
    """What a thread with a context of its own sees."""
    found = []
    thread = threading.Thread(target=lambda: found.append(active_plans()))
    thread.start()
    thread.join(600)
    return found[0]


def test_a_pass_is_cleared_however_it_ends(frames):
    one = frames[0]
    for error in ((), (KeyError,)):
        with contextlib.suppress(*error), passing(one) as frame:
            assert frame is one and one.running
            one.batch = 4
            one.seen.update({1, 2})
            for kind in error:
                raise kind
        assert (one.batch, one.seen, one.running) == (0, set(), None)


def test_a_pass_elsewhere_while_one_runs_has_a_frame_of_its_own(frames):
    one, two, _ = frames
    one.interventions[1], one.names[1] = "act", "name"
    one.enter()
    two.enter()

    def other():
        with passing(one) as frame:
            inside = active_plans()
        return frame, inside, active_plans()

    with passing(one) as outer:
        frame, inside, after = elsewhere(other)
        one.batch = 4
        with passing(one) as again:
            assert again is not one, "the same thread: a model that calls itself"
        assert one.batch == 4 and one.running, "the outer pass goes on"
    assert outer is one and frame is not one
    assert inside == (frame, two) and after == (one, two)
    assert (
        frame.interventions is one.interventions
        and frame.names is one.names
        and frame.stats is one.stats
        and frame.live
    )
    assert elsewhere(other)[0] is one, "free again"


def test_the_frame_of_a_plan_that_ended_stays_ended_elsewhere(frames):
    one = frames[0]
    one.enter()
    one.leave()
    with passing(one):
        frame, _, after = elsewhere(lambda: passing_of(one))
    assert frame is not one and not frame.live and after == ()


def passing_of(frame):
    try:
        with passing(frame) as found:
            raise KeyError
    except KeyError:
        return found, None, active_plans()


class Root:
    """The gate of a model that another library took the model's calls away from, or did not."""

    key = 0

    def __init__(self, there):
        self.there = there

    def reachable(self):
        return self.there

    def lost(self):
        return LostGateError("lost")


def test_a_block_that_is_called_while_its_models_gate_is_lost(frames):
    module = nn.Identity()
    block = gate_of(module)
    for there, batch, lost in ((True, 0, False), (False, 4, False), (None, 0, False), (False, 0, True)):
        root = None if there is None else Root(there)
        plan = ActivePlan(root, Stats())
        plan.batch = batch
        plan.enter()
        with pytest.raises(LostGateError) if lost else contextlib.nullcontext():
            block(torch.ones(1))
        assert plan.seen == (set() if lost else {block.key})
        plan.close()
    lone = Root(False)
    ActivePlan(lone, Stats()).note_outside(lone)  # the model's own gate was called


def test_closed_for_good(frames):
    one, two, _ = frames
    one.interventions[1] = "act"
    for frame in (one, two, one):
        frame.enter()
    one.close()
    assert active_plans() == (two,) and not one.live and not one.interventions and one.root is None


def test_leaving_again_mends_what_an_interrupt_left_between_the_two(frames):
    """Ctrl-C came when the plan was left but still counted among the active ones; `remove()` is called again."""
    one, two, _ = frames
    two.enter()
    one.enter()
    (entry,) = one.entries
    active._ENTERED.set(tuple(each for each in active._ENTERED.get() if each is not entry))
    assert active_plans() == (two, one)
    one.leave_all()
    assert active_plans() == (two,)
    two.leave()


def test_a_plan_whose_handle_was_dropped_is_forgotten_by_whoever_looks_next(frames):
    one, two, _ = frames
    one.enter()
    two.enter()
    one.abandon()
    assert active.ACTIVE.get() == (one, two), "a finalizer changes nothing of what is entered"
    assert one.closed and not one.live and active_plans() == (two,) and active.ACTIVE.get() == (two,)
    two.abandon()
    with active.hold_only([]):
        pass
    assert active.ACTIVE.get() == active._ENTERED.get() == (), "nor is it put back"


COLLECTED = """
import contextvars, gc
from skipguide.active import ActivePlan, active_plans
from skipguide.stats import Stats

others = [contextvars.ContextVar(f"other{i}") for i in range(40)]
for number, other in enumerate(others):
    other.set(number)
mine = contextvars.ContextVar("mine")


class Handle:
    def __init__(self):
        self.circle, self.active = self, ActivePlan(None, Stats())
        self.active.enter()

    def __del__(self):
        self.active.abandon()


gc.set_threshold(1, 1000, 1000)
for number in range(1000):
    Handle()
    mine.set([number])
    assert mine.get() == [number] and [other.get() for other in others] == list(range(40))
gc.collect()
assert active_plans() == ()
"""


def test_handles_are_collected_in_the_middle_of_another_variables_set():
    """Before Python 3.12 that is possible, and closing the plan there crashed the process at the tenth handle."""
    subprocess.run([sys.executable, "-X", "faulthandler", "-c", COLLECTED], check=True, timeout=300)
