"""A plan leaves no trace: after every way of ending it the model is, attribute for attribute, what it was."""

import inspect

import pytest
import torch
from helpers.residue import Watch, families, plans
from torch import nn

from skipguide import Prefix, SkipError, Skipper, SkipPlan, capture, find_blocks, resume
from skipguide.gate import Gate
from zoo import BY_NAME


@families
@plans
def test_normal_exit(family, plan):
    watch = Watch(family)
    for _ in range(2):
        with Skipper(watch.model, plan):
            assert inspect.signature(watch.model.forward) == watch.signature
            assert list(watch.model.state_dict()) == watch.before[0]
            assert torch.equal(watch.run(), watch.plain) == plan.empty
        watch.same()


@families
@plans
def test_exception_in_user_code(family, plan):
    watch = Watch(family)
    with pytest.raises(KeyError), Skipper(watch.model, plan):
        watch.run()
        raise KeyError
    watch.same()


@families
@plans
def test_exception_in_the_model(family, plan):
    watch = Watch(family)
    last = find_blocks(watch.model)[-1].module

    def explode(*args):
        raise RuntimeError("out of memory")

    skipper = Skipper(watch.model, plan)
    handle = last.register_forward_pre_hook(explode)
    with pytest.raises(RuntimeError, match="out of memory"), skipper:
        watch.run()
    handle.remove()
    watch.same()
    with skipper:  # the pass that broke off has not confused the next one
        again = watch.run()
    with Skipper(watch.model, plan):
        assert torch.equal(watch.run(), again)


@families
def test_exception_at_install_takes_the_first_gates_away_again(family, monkeypatch):
    watch = Watch(family)
    skipper = Skipper(watch.model, SkipPlan([1]))
    install, victim = Gate.install, skipper.gates[2]

    def fails(gate, *args, **kwargs):
        if gate is victim:
            raise MemoryError
        install(gate, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Gate, "install", fails)
        with pytest.raises(MemoryError), skipper:
            raise AssertionError("not reached")
    watch.same()
    with skipper:
        assert not torch.equal(watch.run(), watch.plain)
    watch.same()


@families
def test_capture_and_resume(family):
    watch = Watch(family)
    prefix = Prefix(2)
    with capture(watch.model, prefix):
        watch.run()
    watch.same()
    with resume(watch.model, prefix):
        assert torch.equal(watch.run(), watch.plain)
    watch.same()


def test_a_prefix_has_to_fit_the_pass_that_resumes():
    family = BY_NAME["ltx"]
    model, prefix = family.build(), Prefix(2)
    with pytest.raises(SkipError, match="nothing was captured at block 2"), Skipper(model, SkipPlan(), resume=prefix):
        family.run(model, family.inputs(2))
    with capture(model, prefix):
        family.run(model, family.inputs(2))
    with pytest.raises(SkipError, match="1 rows of hidden_states, and 2 were captured"), resume(model, prefix):
        family.run(model, family.inputs(1))
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_module_without_blocks_is_refused_and_untouched():
    model = nn.Linear(2, 2)
    before = sorted(model.__dict__)
    with pytest.raises(SkipError):
        Skipper(model, SkipPlan([0]))
    assert sorted(model.__dict__) == before
