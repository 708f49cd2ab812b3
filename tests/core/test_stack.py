"""The stack of frames: which plans hold here, whatever ends first, and whose pass runs on a frame."""

import contextlib
import contextvars
import threading

import pytest

from skipguide import LostGateError
from skipguide.active import Frame, active_frames, without
from skipguide.stats import Stats


@pytest.fixture
def frames():
    assert active_frames() == ()
    made = [Frame(None, Stats()) for _ in range(3)]
    yield made
    for frame in made:
        frame.close()


def elsewhere(function):
    """In another thread with a copy of this context, as asyncio.to_thread hands it on."""
    found, context = [], contextvars.copy_context()
    thread = threading.Thread(target=lambda: found.append(context.run(function)))
    thread.start()
    thread.join(60)
    return found[0]


def test_entered_twice_is_read_once_and_left_from_the_inside(frames):
    one, two, _ = frames
    for frame in (one, two, one):
        frame.enter()
    assert active_frames() == (one, two)
    one.leave()
    assert active_frames() == (one, two), "the inner entry was left: the order is that of the outer one"
    assert one.live
    one.leave()
    assert active_frames() == (two,) and not one.live and two.live
    two.leave()
    assert active_frames() == () and not two.live


def test_the_outer_one_may_end_first(frames):
    one, two, three = frames
    for frame in frames:
        frame.enter()
    two.leave()
    assert active_frames() == (one, three)
    three.leave()
    one.leave()
    assert active_frames() == ()


def test_left_in_a_thread_that_had_not_entered(frames):
    one = frames[0]
    one.enter()
    assert threading_frames() == ()
    elsewhere(one.leave)
    assert not one.live and active_frames() == (one,), "the stack is this thread's; that the plan ended is everybody's"


def threading_frames():
    """What a thread with a context of its own sees."""
    found = []
    thread = threading.Thread(target=lambda: found.append(active_frames()))
    thread.start()
    thread.join(60)
    return found[0]


def test_without_one_frame_for_a_while_and_after_an_error(frames):
    one, two, _ = frames
    for frame in (one, two, one):
        frame.enter()
    with pytest.raises(KeyError), without(one):
        assert active_frames() == (two,) and one.live
        raise KeyError
    assert active_frames() == (one, two)
    one.leave()
    assert active_frames() == (one, two), "both entries are back"


def test_a_pass_is_cleared_however_it_ends(frames):
    one = frames[0]
    for error in ((), (KeyError,)):
        with contextlib.suppress(*error), one.passing() as frame:
            assert frame is one and one.busy
            one.batch = 4
            one.seen.update({1, 2})
            for kind in error:
                raise kind
        assert (one.batch, one.seen, one.busy) == (0, set(), False)


def test_a_pass_elsewhere_while_one_runs_has_a_frame_of_its_own(frames):
    one, two, _ = frames
    one.acts[1], one.names[1] = "act", "name"
    one.enter()
    two.enter()

    def other():
        with one.passing() as frame:
            inside = active_frames()
        return frame, inside, active_frames()

    with one.passing() as outer:
        frame, inside, after = elsewhere(other)
        one.batch = 4
        with one.passing() as again:
            assert again is not one, "the same thread: a model that calls itself"
        assert one.batch == 4 and one.busy, "the outer pass goes on"
    assert outer is one and frame is not one
    assert inside == (frame, two) and after == (one, two)
    assert frame.acts is one.acts and frame.names is one.names and frame.stats is one.stats and frame.live
    assert elsewhere(other)[0] is one, "free again"


def test_the_frame_of_a_plan_that_ended_stays_ended_elsewhere(frames):
    one = frames[0]
    one.enter()
    one.leave()
    with one.passing():
        frame, _, after = elsewhere(lambda: passing_of(one))
    assert frame is not one and not frame.live and after == ()


def passing_of(frame):
    try:
        with frame.passing() as found:
            raise KeyError
    except KeyError:
        return found, None, active_frames()


class Root:
    """The gate of a model that another library took the model's calls away from, or did not."""

    key = 0

    def __init__(self, there):
        self.there = there

    def reachable(self):
        return self.there

    def lost(self):
        return LostGateError("lost")


def test_a_block_that_is_called_while_its_models_gate_is_lost():
    block = Root(True)
    block.key = 7
    for root, batch, lost in (
        (Root(True), 0, False),
        (Root(False), 4, False),
        (None, 0, False),
        (Root(False), 0, True),
    ):
        frame = Frame(root, Stats())
        frame.batch = batch
        with pytest.raises(LostGateError) if lost else contextlib.nullcontext():
            frame.saw(block)
        assert frame.seen == (set() if lost else {7})
    Frame(lone := Root(False), Stats()).saw(lone)  # the model's own gate was called


def test_closed_for_good(frames):
    one, two, _ = frames
    one.acts[1] = "act"
    for frame in (one, two, one):
        frame.enter()
    one.close()
    assert active_frames() == (two,) and not one.live and not one.acts and one.root is None
