"""A plan leaves no trace: however it ends, beside other plans and adapters, in copies and files."""

import copy
import gc
import inspect
import io
import pickle
import weakref

import pytest
import torch
from helpers import llm_zoo
from helpers.residue import PLANS, Watch, families, no_gates, plans
from torch import nn

from skipguide import LostGateError, Prefix, SkipError, Skipper, SkipPlan, active, capture, find_blocks, resume
from skipguide.active import active_plans
from skipguide.gate import Gate, gate_of
from skipguide.llm import SublayerPlan
from zoo import BY_NAME

# A plan leaves no trace: after every way of ending it the model is, attribute for attribute, what it was.


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


# Several plans on one model add up, and leave no trace in whatever order they end.


@families
def test_nested_plans_add_up_and_the_inner_exit_leaves_the_outer(family):
    watch = Watch(family)
    outer, inner = SkipPlan([1]), SkipPlan([2], "mlp")
    alone = {}
    for name, plan in {"outer": outer, "inner": inner, "both": outer | inner}.items():
        with Skipper(watch.model, plan):
            alone[name] = watch.run()
    with Skipper(watch.model, outer) as first:
        with Skipper(watch.model, inner):
            assert torch.equal(watch.run(), alone["both"])
        assert torch.equal(watch.run(), alone["outer"])
        with pytest.raises(KeyError), Skipper(watch.model, inner):
            raise KeyError
        assert torch.equal(watch.run(), alone["outer"])
    watch.same()
    assert first.stats.passes == 3


@pytest.mark.parametrize("family", [BY_NAME[name] for name in ("ltx", "latte", "flux")], ids=repr)
@pytest.mark.parametrize("parts", [("block", "block"), ("block", "attn"), ("attn", "block"), ("mlp", "attn_identity")])
def test_rows_of_two_plans_add_up(family, parts):
    """Row 0 skips one part, row 2 the other, of the same block: nested, and as one plan."""
    watch = Watch(family, batch=4)
    first, second = SkipPlan([1], parts[0], rows=[0]), SkipPlan([1], parts[1], rows=[2])
    expected = watch.plain.clone()
    for plan, row in ((first, 0), (second, 2)):
        with Skipper(watch.model, plan):
            expected[row] = watch.run()[row]
    with Skipper(watch.model, first | second):
        torch.testing.assert_close(watch.run(), expected, atol=2e-6, rtol=1e-5)
    with Skipper(watch.model, first) as a, Skipper(watch.model, second) as b:
        torch.testing.assert_close(watch.run(), expected, atol=2e-6, rtol=1e-5)
    name = find_blocks(watch.model)[1].name
    ran = 4 - parts.count("block")
    assert a.stats.rows[name] == b.stats.rows[name] == ran
    watch.same()


@families
def test_one_skipper_entered_twice_counts_once(family):
    watch = Watch(family)
    skipper = Skipper(watch.model, SkipPlan([1], rows=[0]))
    with skipper:
        once = watch.run()
        with skipper:
            assert torch.equal(watch.run(), once)
        assert torch.equal(watch.run(), once)
    watch.same()
    assert skipper.stats.passes == 3
    assert set(skipper.stats.calls.values()) == {3}


@families
def test_exit_out_of_order(family):
    watch = Watch(family)
    first, second = Skipper(watch.model, SkipPlan([1])), Skipper(watch.model, SkipPlan([2]))
    with Skipper(watch.model, SkipPlan([2])):
        only_second = watch.run()
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert torch.equal(watch.run(), only_second)
    second.__exit__()
    watch.same()


def test_many_plans_in_any_order():
    watch = Watch(BY_NAME["ltx"])
    skippers = [Skipper(watch.model, SkipPlan([i % 4], ("block", "attn", "mlp")[i % 3])) for i in range(12)]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3)).tolist()
    for skipper in skippers:
        skipper.__enter__()
    for i in order:
        watch.run()
        skippers[i].__exit__()
    watch.same()


# A plan beside adapters of peft, and beside modules that are exchanged.


def add_lora(model, targets=("to_q", "to_v")):
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False), model)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


@families
@pytest.mark.parametrize("part", ["block", "attn", "mlp", "attn_identity"])
def test_lora_before_during_and_after_a_plan(family, part):
    inputs = family.inputs(2)
    plan = SkipPlan([1], part)
    reference = family.build()
    add_lora(reference)
    plain = family.run(reference, inputs)
    with Skipper(reference, plan):
        skipped = family.run(reference, inputs)
    assert not torch.equal(plain, skipped)

    during = family.build()
    with Skipper(during, plan):
        add_lora(during)
        assert torch.equal(family.run(during, inputs), skipped)
    assert torch.equal(family.run(during, inputs), plain)
    no_gates(during)

    after = family.build()
    with Skipper(after, plan):
        family.run(after, inputs)
    add_lora(after)
    assert torch.equal(family.run(after, inputs), plain)
    assert list(after.state_dict()) == list(reference.state_dict())


def test_lora_on_a_layer_that_is_itself_gated():
    """Flux' single blocks: leaving out the feed-forward gates proj_mlp, which an adapter would replace."""
    family = BY_NAME["flux"]
    inputs = family.inputs(2)
    plan = SkipPlan([4], "mlp")
    model = family.build()
    with Skipper(model, plan):
        skipped = family.run(model, inputs)
    with pytest.raises(LostGateError, match=r"proj_mlp is now another module \(peft"), Skipper(model, plan):
        add_lora(model, ["proj_mlp"])
        family.run(model, inputs)
    no_gates(model)
    with Skipper(model, plan) as skipper:  # applied after the adapter: the whole adapted layer is left out
        out = family.run(model, inputs)
    assert skipper.stats.skips == {"single_transformer_blocks.1.proj_mlp": 1}
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not name.startswith("single_transformer_blocks.1."):
            module.enable_adapters(False)
    with Skipper(model, plan):
        out = family.run(model, inputs)
    assert torch.equal(out, skipped)


def test_a_block_that_is_exchanged_is_noticed():
    watch = Watch(BY_NAME["ltx"])
    blocks = watch.model.transformer_blocks
    with pytest.raises(LostGateError, match=r"blocks\.1 is now another module"), Skipper(watch.model, SkipPlan([1])):
        blocks[1] = copy.deepcopy(blocks[1])
        watch.run()


def test_peft_model_wrapper():
    from peft import LoraConfig, get_peft_model

    family = BY_NAME["ltx"]
    inputs = family.inputs(2)
    with Skipper(base := family.build(), SkipPlan([1], rows=[0])):
        skipped = family.run(base, inputs)
    wrapped = get_peft_model(base, LoraConfig(r=2, target_modules=["to_q"]))  # a new adapter adds zero
    for outer in (wrapped, base):
        for inner in (wrapped, base):
            with Skipper(outer, SkipPlan([1], rows=[0])) as skipper:
                torch.testing.assert_close(family.run(inner, inputs), skipped)
            assert skipper.stats.passes == 1
    no_gates(wrapped)


# Copies and files of a model under a plan, and a dropped model that is freed.


@families
def test_deepcopy_during_and_after(family):
    watch = Watch(family)
    with Skipper(watch.model, SkipPlan([1])):
        skipped = watch.run()
        clone = copy.deepcopy(watch.model)
        no_gates(clone)
        assert all(
            set(module.__dict__) == set(twin.__dict__) - {"forward"} and "forward" not in module.__dict__
            for module, twin in zip(clone.modules(), watch.model.modules(), strict=True)
        ), "nor any attribute of theirs"
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


class Counting:
    """A context variable that counts how often it is set."""

    def __init__(self, variable):
        self.variable, self.count = variable, 0
        self.get = variable.get

    def set(self, value):
        self.count += 1
        return self.variable.set(value)


@pytest.mark.parametrize("handle", ["a Skipper", "a sublayer plan"])
def test_the_garbage_collector_sets_no_context_variable(handle, monkeypatch):
    """It may come in the middle of another `set`, and then a second one corrupts memory before Python 3.12."""
    monkeypatch.setattr(active, "_ENTERED", Counting(active._ENTERED))
    monkeypatch.setattr(active, "ACTIVE", Counting(active.ACTIVE))
    if handle == "a Skipper":
        model = BY_NAME["ltx"].build()
        applied = Skipper(model, SkipPlan([1])).__enter__()
    else:
        model = llm_zoo.BY_NAME["llama"].build()
        applied = SublayerPlan(attn=[1]).apply(model)
    gone, before = weakref.ref(model), active._ENTERED.count
    assert before and active_plans()
    del model, applied
    gc.collect()
    assert gone() is None and active._ENTERED.count == active.ACTIVE.count == before
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
