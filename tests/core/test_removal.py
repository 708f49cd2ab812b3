"""Removal: whoever ends takes away what is its own, any number of times, and ends nobody else's."""

import gc

import pytest
import torch
from helpers.residue import Watch

from skipguide import Skipper, SkipPlan, remove_from
from skipguide.active import active_plans
from skipguide.gate import Gate, Installation, gate_of, installed_gates
from skipguide.pipelines import SpatiotemporalSkipGuidance
from skipguide.router import Router
from zoo import BY_NAME
from zoo.pipes import BY_PIPE


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


# -- Ctrl-C while `with ...apply(...)` ends: nobody has the handle


def interrupted(monkeypatch, owner, name, at):
    """Ctrl-C when a method is called for the time `at`, once; gives the calls so far."""
    method, calls = getattr(owner, name), [0]

    def replaced(*args, **kwargs):
        calls[0] += 1
        if calls[0] == at:
            raise KeyboardInterrupt
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, replaced)
    return calls


@pytest.mark.parametrize("at", [1, 2, 5])
@pytest.mark.parametrize("name", ["remove", "_stand_back", "_holders"])
def test_guidance_is_gone_after_an_interrupt_of_its_end(name, at, monkeypatch):
    case = BY_PIPE["ltx"]
    pipe = case.build()
    plain = case.run(pipe, 1, True)
    applied = SpatiotemporalSkipGuidance([1]).apply(pipe)
    with pytest.raises(KeyboardInterrupt), applied:
        calls = interrupted(monkeypatch, Gate, name, at)
    assert calls[0] > at and applied.pipe is None
    assert not installed_gates(pipe.transformer.modules())
    assert torch.equal(case.run(pipe, 1, True), plain)


def test_gates_that_nobody_wants_go_with_the_rest(watch):
    """Their handle was dropped between two interrupts: they pass calls on, until somebody tidies up."""
    skipper = Skipper(watch.model, SkipPlan([1]))
    skipper.install()
    del skipper
    gc.collect()
    assert installed_gates(watch.model.modules()) and torch.equal(watch.run(), watch.plain)
    kept = Skipper(watch.model, SkipPlan([1]))
    kept.install()
    assert remove_from(watch.model) == []
    with kept.running():
        assert not torch.equal(watch.run(), watch.plain), "others' stay"
    kept.remove()
    assert remove_from(watch.model) == [] and not installed_gates(watch.model.modules())
    watch.same()
