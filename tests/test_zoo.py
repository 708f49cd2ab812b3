"""The reference models: they build, every sublayer matters, the written-out attention is right."""

import copy

import pytest
import torch

from zoo import FAMILIES, JOINT, values

BLOCKS = [
    pytest.param(family, i, id=f"{family.name}-{name}")
    for family in FAMILIES
    for i, name in enumerate(family.block_names)
]


@pytest.fixture(scope="module")
def built():
    made = {}

    def get(family):
        if family.name not in made:
            made[family.name] = family.build()
        return made[family.name]

    return get


def effect(edited, plain):
    return ((edited - plain).norm() / plain.norm()).item()


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_builds_and_runs(family, built):
    model, inputs = built(family), family.inputs(3)
    out = family.run(model, inputs)
    assert torch.isfinite(out).all()
    assert out.shape[0] == 3
    assert torch.equal(out, family.run(family.build(), inputs)), "the same seed gives the same model"
    assert effect(out[0], out[1]) > 0.05, "rows differ"
    torch.testing.assert_close(out[:2], family.run(model, family.inputs(2)))
    assert not torch.equal(out, family.run(model, family.inputs(3, seed=9)))
    assert all(parameter.std() > 0 for parameter in model.parameters() if parameter.numel() > 1)


@pytest.mark.parametrize(("family", "i"), BLOCKS)
def test_every_edit_has_a_visible_effect(family, i, built):
    model, inputs = built(family), family.inputs(2)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = family.run(model, inputs)
    edits = {part: family.zeroed(model, i, part) for part in family.parts(i)}
    edits["block"] = family.identity_block(model, i)
    edits["attn_identity"] = family.value_identity(model, i, inputs)
    for name, edited in edits.items():
        assert 0.03 < effect(family.run(edited, inputs), plain) < 1.2, name
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(family.run(model, inputs), plain)


@pytest.mark.parametrize(("family", "i"), [block for block in BLOCKS if block.values[0] in JOINT])
def test_written_out_attention_without_the_edit_is_the_stock_one(family, i, built, monkeypatch):
    """The same code, video rows not overwritten, gives the stock model's output."""
    monkeypatch.setattr(
        values,
        "attend",
        lambda q, k, v, video, mask=None: torch.nn.functional.scaled_dot_product_attention(q, k, v, mask),
    )
    monkeypatch.setattr(values.SelfValues, "forward", lambda self, *args, **kw: self.attn(*args, **kw))
    model, inputs = built(family), family.inputs(3)
    stock = family.run(model, inputs)
    torch.testing.assert_close(
        family.run(family.value_identity(model, i, inputs), inputs), stock, atol=2e-6, rtol=0
    )


def test_identity_of_all_blocks_is_the_model_without_blocks(built):
    """PassThrough against the plainest reference there is: an empty block list."""
    family = next(family for family in FAMILIES if family.name == "ltx")
    model, inputs = built(family), family.inputs(2)
    edited = model
    for i in range(len(family.blocks)):
        edited = family.identity_block(edited, i)
    empty = copy.deepcopy(model)
    empty.transformer_blocks = torch.nn.ModuleList()
    assert torch.equal(family.run(edited, inputs), family.run(empty, inputs))
