"""Strength: between the plain model, to the bit, and the part as it is named, to the bit, for every family and part."""

import copy

import pytest
import torch
import torchvision
from helpers.llm_zoo import BY_NAME as LANGUAGE

from skipguide import SkipError, Skipper, SkipPlan, find_blocks
from zoo import BY_NAME, FAMILIES, perturbed

families = pytest.mark.parametrize("family", FAMILIES, ids=repr)
STRENGTH = 0.3
# where a norm follows what a sublayer returns, its contribution is what the norm returns
NORMED = {
    "mochi": {"attn": ("norm2", "norm2_context"), "mlp": ("norm4", "norm4_context")},
    "lumina2": {"attn": ("norm2",), "mlp": ("ffn_norm2",)},
    "zimage": {"attn": ("attention_norm2",), "mlp": ("ffn_norm2",)},
    "ideogram4": {"attn": ("attention_norm2",), "mlp": ("ffn_norm2",)},
    "fibo2": {"attn": ("attention_norm2",), "mlp": ("ffn_norm2",), "cross_attn": ("cross_attn_norm2",)},
}


def under(family, model, inputs, *args, **kwargs):
    with Skipper(model, SkipPlan(*args, **kwargs)) as skipper:
        out = family.run(model, inputs)
    return out, skipper.stats


def close(family, out, reference):
    size = max(1.0, reference.abs().max().item())
    torch.testing.assert_close(out, reference, atol=max(family.slack, 5e-6) * size, rtol=0)


def one_of_each(family):
    """The first block of every stack that the laws are checked on."""
    stacks = {family.block_names[i].rpartition(".")[0]: i for i in reversed(family.layers)}
    return sorted(stacks.values())


def scaled(family, model, i, part):
    """The branch at 1 - strength, in the weights of a copy."""
    if (paths := NORMED.get(family.name, {}).get(part)) is None:
        return family.scaled(model, i, part, 1 - STRENGTH)
    edited = copy.deepcopy(model)
    block = edited.get_submodule(family.block_names[i])
    for path in paths:
        if getattr(block, path, None) is not None:
            setattr(block, path, perturbed.Scaled(getattr(block, path), 1 - STRENGTH))
    return edited


@families
def test_the_ends_are_the_plain_model_and_the_part(family):
    """Every part that a block says it has: its tokens lie where the family's grid says."""
    model, inputs = family.build(), family.inputs(2)
    plain, blocks = family.run(model, inputs), find_blocks(model)
    for block in (blocks[i] for i in one_of_each(family)):
        for part in block.parts:
            out, stats = under(family, model, inputs, [block.index], part, strength=0)
            assert torch.equal(out, plain) and stats.skipped_fraction == 0, part
            whole, _ = under(family, model, inputs, [block.index], part)
            assert not torch.equal(whole, plain), part
            assert torch.equal(under(family, model, inputs, [block.index], part, strength=1.0)[0], whole), part
            near, stats = under(family, model, inputs, [block.index], part, strength=1 - 1e-6)
            torch.testing.assert_close(near, whole, atol=1e-3, rtol=0)
            assert stats.skipped_fraction == 0, part


@families
def test_a_branch_is_scaled(family):
    model, inputs = family.build(), family.inputs(2)
    for i in one_of_each(family):
        for part in family.parts(i):
            out, stats = under(family, model, inputs, [i], part, strength=STRENGTH)
            close(family, out, family.run(scaled(family, model, i, part), inputs))
            assert set(family.block_names) <= set(stats.calls) and not stats.skips


@families
def test_a_block_is_scaled(family):
    model, inputs = family.build(), family.inputs(2)
    for i in one_of_each(family):
        name, edited = family.block_names[i], copy.deepcopy(model)
        out_of_it = family.identity_block(model, i).get_submodule(name)
        edited.set_submodule(name, perturbed.Mixed(edited.get_submodule(name), out_of_it, STRENGTH))
        out, stats = under(family, model, inputs, [i], strength=STRENGTH)
        close(family, out, family.run(edited, inputs))
        assert stats.calls[name] == 1 and not stats.skips


def test_rows_and_steps_of_a_scaled_block():
    family = BY_NAME["ltx"]
    model, inputs = family.build(), family.inputs(3)
    plain, (every, _) = family.run(model, inputs), under(family, model, inputs, [1], "attn", strength=0.5)
    some, _ = under(family, model, inputs, [1], "attn", strength=0.5, rows=[2])
    close(family, some[:2], plain[:2])
    close(family, some[2:], every[2:])
    with Skipper(model, SkipPlan([1], "attn", strength=0.5, start=0.5)) as skipper:
        skipper.progress = 0.0
        assert torch.equal(family.run(model, inputs), plain)
        skipper.progress = 0.5
        assert torch.equal(family.run(model, inputs), every)


def test_language_models_scale_blocks_and_refuse_branches():
    """A norm behind a branch would undo what scales it, and which families have one is not described."""
    case = LANGUAGE["llama"]
    model = case.build()
    tokens = torch.arange(1, 9)[None]
    blocks = len(find_blocks(model))

    def hidden(plan=None):
        with torch.no_grad():
            if plan is None:
                return model(tokens, output_hidden_states=True, use_cache=False).hidden_states
            with Skipper(model, plan):
                return model(tokens, output_hidden_states=True, use_cache=False).hidden_states

    before, after = hidden()[blocks - 2 : blocks]  # what enters the last block but one, and what leaves it
    made = hidden(SkipPlan([blocks - 2], strength=STRENGTH))[blocks - 1]
    torch.testing.assert_close(made, (1 - STRENGTH) * after + STRENGTH * before)
    with pytest.raises(SkipError, match="a norm may follow"):
        Skipper(model, SkipPlan([1], "mlp", strength=0.5))
    with pytest.raises(SkipError, match="not described where"):
        Skipper(model, SkipPlan([1], "token_shuffle"))


def test_a_vision_transformer_scales_blocks_and_has_no_other_parts():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(16, 8, 3, 2, 16, 32, num_classes=4).eval()
    torch.nn.init.normal_(model.heads.head.weight)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        plain = model(images)
        with Skipper(model, SkipPlan([1], strength=STRENGTH)):
            out = model(images)
        edited = copy.deepcopy(model)
        edited.encoder.layers[1] = perturbed.Mixed(edited.encoder.layers[1], torch.nn.Identity(), STRENGTH)
        torch.testing.assert_close(out, edited(images))
    assert not torch.allclose(out, plain)
    with pytest.raises(SkipError, match="not described where"):
        Skipper(model, SkipPlan([1], "self_swap"))
