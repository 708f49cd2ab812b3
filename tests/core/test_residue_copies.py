"""Copies and files of a model under a plan, and a dropped model that is freed."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from helpers.residue import PLANS, Watch, families, no_gates

from skipguide import SkipError, Skipper, SkipPlan, find_blocks
from skipguide.active import active_plans
from skipguide.gate import gate_of
from zoo import BY_NAME


@families
def test_deepcopy_during_and_after(family):
    watch = Watch(family)
    with Skipper(watch.model, SkipPlan([1])):
        skipped = watch.run()
        clone = copy.deepcopy(watch.model)
        no_gates(clone)
        assert torch.equal(watch.run(clone), watch.plain), "the plan is on the model, not on its copy"
        assert torch.equal(watch.run(), skipped)
    for copied in (clone, copy.deepcopy(watch.model)):
        own = {id(module) for module in copied.modules()}
        for module in copied.modules():
            assert module.forward.__self__ is module and id(module) in own
        assert torch.equal(watch.run(copied), watch.plain)
        with Skipper(copied, SkipPlan([1])):
            assert torch.equal(watch.run(copied), skipped)
            assert torch.equal(watch.run(), watch.plain)
        assert torch.equal(watch.run(pickle.loads(pickle.dumps(copied))), watch.plain)
    watch.same()


@families
def test_files_during_and_after(family, tmp_path):
    watch = Watch(family)
    with Skipper(watch.model, SkipPlan([1], "attn")):
        with pytest.raises(SkipError, match="active plan"):
            pickle.dumps(watch.model)
        with pytest.raises(SkipError, match="active plan"):
            torch.save(watch.model, io.BytesIO())
        watch.model.save_pretrained(tmp_path)
        torch.save(watch.model.state_dict(), io.BytesIO())
    watch.same()
    loaded = type(watch.model).from_pretrained(tmp_path).eval()
    assert torch.equal(watch.run(loaded), watch.plain)
    file = io.BytesIO()
    torch.save(watch.model, file)
    file.seek(0)
    assert torch.equal(watch.run(torch.load(file, weights_only=False)), watch.plain)
    assert torch.equal(watch.run(pickle.loads(pickle.dumps(watch.model))), watch.plain)


@families
@pytest.mark.parametrize("plan", [PLANS[name] for name in ("block", "identity", "rows")])
@pytest.mark.parametrize("how", ["installed", "entered", "over"])
def test_a_dropped_model_is_freed(family, plan, how):
    model = family.build()
    skipper = Skipper(model, plan)
    {"installed": skipper.install, "entered": skipper.__enter__, "over": lambda: None}[how]()
    with skipper.running() if how != "over" else skipper:
        family.run(model, family.inputs(2))
    alive = [weakref.ref(model), weakref.ref(find_blocks(model)[1].module), weakref.ref(gate_of(model))]
    del skipper, model
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3
    assert active_plans() == ()


def test_gates_do_not_keep_each_others_models_alive():
    first, second = BY_NAME["ltx"].build(), BY_NAME["ltx"].build()
    alive = weakref.ref(first)
    outer = Skipper(second, SkipPlan([1]))
    with outer:
        with Skipper(first, SkipPlan([1])):
            BY_NAME["ltx"].run(first, BY_NAME["ltx"].inputs(1))
        del first
        gc.collect()
        assert alive() is None
