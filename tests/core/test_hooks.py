"""A plan beside the hooks of accelerate and diffusers, put on and taken off in any order."""

import inspect
from contextlib import ExitStack

import pytest
import torch
from helpers.residue import Watch, families, no_gates, traces

from skipguide import LostGateError, Skipper, SkipPlan, find_blocks
from zoo import BY_NAME


def accelerate_hook(module):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Doubling(ModelHook):
        """Visible in the output, so that a lost hook is seen."""

        def post_forward(self, module, output):
            return tuple(2 * o for o in output) if isinstance(output, tuple) else 2 * output

    add_hook_to_module(module, Doubling())


def accelerate_unhook(module):
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(module)


def diffusers_hook(module, own_forward=False):
    from diffusers.hooks import HookRegistry, ModelHook

    class Doubling(ModelHook):
        def post_forward(self, module, output):
            return tuple(2 * o for o in output) if isinstance(output, tuple) else 2 * output

    class Forwarding(Doubling):
        def new_forward(self, module, *args, **kwargs):
            return self.fn_ref.original_forward(*args, **kwargs)

    HookRegistry.check_if_exists_or_initialize(module).register_hook(
        Forwarding() if own_forward else Doubling(), "doubling"
    )


def diffusers_unhook(module):
    module._diffusers_hook.remove_hook("doubling", recurse=False)


OTHERS = {
    "accelerate": (accelerate_hook, accelerate_unhook),
    "diffusers": (diffusers_hook, diffusers_unhook),
    "diffusers, own forward": (lambda module: diffusers_hook(module, own_forward=True), diffusers_unhook),
}
others = pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)


def left_by(other, family, index):
    """The attributes that the other library alone leaves on a block, and the output while it is there."""
    watch = Watch(family)
    module = find_blocks(watch.model)[index].module
    other[0](module)
    out = watch.run()
    other[1](module)
    return sorted(module.__dict__), out


@families
@others
def test_gate_then_hook_then_gate_off_then_hook_off(family, other):
    left, hooked = left_by(other, family, 1)
    watch = Watch(family)
    module = find_blocks(watch.model)[1].module
    with ExitStack() as stack:
        stack.enter_context(Skipper(watch.model, SkipPlan([2])))
        other[0](module)
        both = watch.run()
        assert not torch.equal(both, hooked)
        with Skipper(watch.model, SkipPlan([1])):  # the hook stays around a block that is skipped
            watch.run()
        assert torch.equal(watch.run(), both)
    assert torch.equal(watch.run(), hooked)
    no_gates(watch.model)
    assert next(iter(inspect.signature(module.forward).parameters)) == "hidden_states"
    with Skipper(watch.model, SkipPlan([2])):
        assert torch.equal(watch.run(), both)
    assert torch.equal(watch.run(), hooked)
    other[1](module)
    assert sorted(module.__dict__) == left
    watch.ungated()


@families
@others
def test_hook_then_gate_then_gate_off(family, other):
    _, hooked = left_by(other, family, 1)
    watch = Watch(family)
    module = find_blocks(watch.model)[1].module
    other[0](module)
    before = traces(watch.model)
    with Skipper(watch.model, SkipPlan([1])):
        watch.run()
    assert traces(watch.model) == before
    assert torch.equal(watch.run(), hooked)


@families
@others
def test_hook_then_gate_then_hook_off_is_noticed(family, other):
    left, _ = left_by(other, family, 1)
    watch = Watch(family)
    module = find_blocks(watch.model)[1].module
    other[0](module)
    library = "accelerate" if other[0] is accelerate_hook else "diffusers"
    with pytest.raises(LostGateError, match=rf"blocks\.1 was replaced.*{library}"), Skipper(watch.model, SkipPlan([1])):
        other[1](module)
        watch.run()
    assert sorted(module.__dict__) == left
    watch.ungated()
    with Skipper(watch.model, SkipPlan([1])) as skipper:
        watch.run()
    assert skipper.stats.skips


@families
def test_a_second_plan_on_a_lost_gate_is_refused_at_once(family):
    watch = Watch(family)
    module = find_blocks(watch.model)[1].module
    accelerate_hook(module)
    first, second = Skipper(watch.model, SkipPlan([2])), Skipper(watch.model, SkipPlan([1]))
    with first:
        accelerate_unhook(module)
        with pytest.raises(LostGateError, match="accelerate"), second:
            raise AssertionError("not reached")
    watch.ungated()


def test_the_models_own_gate_lives_through_an_offload_cycle():
    """Pipelines with model offload take accelerate's hook off the model and put it on again after every run."""
    watch = Watch(BY_NAME["wan"])
    with Skipper(watch.model, SkipPlan([1])):
        expected = watch.run()
    accelerate_hook(watch.model)
    with Skipper(watch.model, SkipPlan([1])) as skipper:
        for _ in range(3):
            out = watch.family.run(watch.model, watch.inputs)
            torch.testing.assert_close(out, 2 * expected)
            accelerate_unhook(watch.model)
            accelerate_hook(watch.model)
    assert skipper.stats.passes == 3
    assert torch.equal(watch.run(), 2 * watch.plain)
    accelerate_unhook(watch.model)
    watch.ungated()


def test_losing_the_models_own_gate_is_noticed():
    watch = Watch(BY_NAME["wan"])
    diffusers_hook(watch.model)
    with pytest.raises(LostGateError, match="WanTransformer3DModel"), Skipper(watch.model, SkipPlan([1])):
        diffusers_unhook(watch.model)
        watch.run()
    watch.ungated()


@families
def test_two_hooks_and_a_gate_in_the_middle(family):
    """accelerate, gate, diffusers: the gate comes out of the middle, then either hook."""
    watch = Watch(family)
    module = find_blocks(watch.model)[1].module
    accelerate_hook(module)
    hooked = watch.run()
    with Skipper(watch.model, SkipPlan([2])):
        diffusers_hook(module)
        watch.run()
    no_gates(watch.model)
    diffusers_unhook(module)
    assert torch.equal(watch.run(), hooked)
    accelerate_unhook(module)
    watch.ungated()


@families
def test_a_wrapper_that_nobody_knows_keeps_working(family):
    """Somebody's own monkey patch around a gate: the gate stays in it, inert, and plans can come and go."""
    watch = Watch(family)
    module = find_blocks(watch.model)[1].module
    calls = []

    with Skipper(watch.model, SkipPlan([2])):
        gated = module.forward

        def patched(*args, **kwargs):
            calls.append(1)
            return gated(*args, **kwargs)

        module.forward = patched
        watch.run()
    assert torch.equal(watch.run(), watch.plain)
    with Skipper(watch.model, SkipPlan([1])) as skipper:
        out = watch.run()
    with Skipper(family.build(), SkipPlan([1])) as other:
        assert torch.equal(family.run(other.model, watch.inputs), out)
    assert skipper.stats.skips and len(calls) == 2
    assert torch.equal(watch.run(), watch.plain)


# -- diffusers' own features ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate_first", [True, False])
def test_layerwise_casting(gate_first):
    from diffusers.hooks import apply_layerwise_casting

    def cast(model):
        apply_layerwise_casting(model, torch.bfloat16, torch.float32)

    watch = Watch(BY_NAME["ltx"])
    reference = watch.family.build()
    cast(reference)
    plain = watch.run(reference)
    with Skipper(reference, SkipPlan([1])):
        skipped = watch.run(reference)
    assert not torch.equal(plain, skipped)
    if not gate_first:
        cast(watch.model)
    with Skipper(watch.model, SkipPlan([1])):
        if gate_first:
            cast(watch.model)
        assert torch.equal(watch.run(), skipped)
    no_gates(watch.model)
    assert torch.equal(watch.run(), plain)


@pytest.mark.parametrize("gate_first", [True, False])
def test_first_block_cache(gate_first):
    """With a threshold of zero the cache computes everything: outputs are the plain ones."""
    from diffusers import FirstBlockCacheConfig

    watch = Watch(BY_NAME["ltx"])
    config = FirstBlockCacheConfig(threshold=0.0)
    with Skipper(watch.model, SkipPlan([2])):
        skipped = watch.run()
    if not gate_first:
        watch.model.enable_cache(config)
    with Skipper(watch.model, SkipPlan([2])):
        if gate_first:
            watch.model.enable_cache(config)
        with watch.model.cache_context("cond"):
            assert torch.equal(watch.run(), skipped)
    no_gates(watch.model)
    with watch.model.cache_context("uncond"):
        assert torch.equal(watch.run(), watch.plain)
    watch.model.disable_cache()
    watch.ungated()
