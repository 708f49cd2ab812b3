"""A plan beside adapters of peft, and beside modules that are exchanged."""

import copy

import pytest
import torch
from helpers.residue import Watch, families, no_gates

from skipguide import LostGateError, Skipper, SkipPlan
from zoo import BY_NAME


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
