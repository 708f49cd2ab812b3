"""Removal: whoever ends takes away what is its own, any number of times, and ends nobody else's."""

import pytest
import torch
from helpers.residue import Watch

from skipguide import Skipper, SkipPlan
from skipguide.active import active_plans
from skipguide.gate import Installation, gate_of
from skipguide.router import Router
from zoo import BY_NAME


@pytest.fixture
def watch():
    return Watch(BY_NAME["ltx"])


@pytest.mark.parametrize("end", ["remove", "leave", "remove_twice", "drop"])
def test_one_that_never_began_ends_nothing(watch, end):
    with Skipper(watch.model, SkipPlan([1])):
        skipped = watch.run()
        other = Skipper(watch.model, SkipPlan([1]))
        if end == "leave":
            other.__exit__(None, None, None)
        elif end != "drop":
            other.remove()
        if end == "remove_twice":
            other.remove()
        del other
        assert torch.equal(watch.run(), skipped) and not torch.equal(skipped, watch.plain)
    watch.same()


def test_removed_again_after_the_block_and_inside_it(watch):
    skipper = Skipper(watch.model, SkipPlan([1]))
    with skipper:
        skipped = watch.run()
    for _ in range(3):
        skipper.remove()
    watch.same()
    with skipper:
        assert torch.equal(watch.run(), skipped)
        skipper.remove()
        assert torch.equal(watch.run(), watch.plain), "the plan ended with its gates"
        skipper.remove()
    watch.same()
    with skipper:
        assert torch.equal(watch.run(), skipped), "the model is not poisoned"
    watch.same()


def test_installed_twice_is_removed_once(watch):
    skipper = Skipper(watch.model, SkipPlan([1]))
    skipper.install()
    skipper.install()
    with skipper.running():
        assert not torch.equal(watch.run(), watch.plain)
    with skipper:
        watch.run()
    assert "forward" in watch.model.__dict__, "it was installed before the block, and stays so"
    skipper.remove()
    watch.same()


def test_entered_twice_ends_with_the_outer_block(watch):
    skipper = Skipper(watch.model, SkipPlan([1]))
    with skipper:
        with skipper:
            skipped = watch.run()
        assert torch.equal(watch.run(), skipped)
    watch.same()


def test_routers_end_their_own(watch):
    router, other = Router(watch.model), Router(watch.model)
    with router.running(lambda i, x: torch.tensor([False, False]) if i == 1 else None):
        skipped = watch.run()
        for _ in range(2):
            other.remove()
            router.remove()
        assert torch.equal(watch.run(), skipped) and not torch.equal(skipped, watch.plain)
    watch.same()
    router.install()
    router.install()
    other.remove()
    assert "forward" in watch.model.__dict__
    router.remove()
    router.remove()
    watch.same()


def test_a_skipper_that_was_dropped_inside_its_block_wants_its_gates_no_more(watch):
    skipper = Skipper(watch.model, SkipPlan([1])).__enter__()
    del skipper
    assert active_plans() == ()
    assert torch.equal(watch.run(), watch.plain)
    with Skipper(watch.model, SkipPlan([2])):
        watch.run()
    skipper = Skipper(watch.model, SkipPlan([1]))
    skipper.install()
    skipper.remove()
    watch.same()


def test_a_gate_counts_each_user_once():
    module = torch.nn.Linear(2, 2)
    gate = gate_of(module)
    one, two = Installation([gate]), Installation([gate, gate])
    for _ in range(2):
        one.install()
        two.install()
    assert len(gate.users) == 2
    one.remove()
    one.remove()
    assert "forward" in module.__dict__
    two.remove()
    assert "forward" not in module.__dict__ and not gate.users
