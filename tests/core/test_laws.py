"""The laws, for every family and every part, against references that are built into copies of the model."""

import pytest
import torch

from skipguide import Prefix, Skipper, SkipPlan, capture, check, find_blocks, resume
from skipguide.arguments import Arguments
from zoo import FAMILIES

families = pytest.mark.parametrize("family", FAMILIES, ids=repr)


def skipped(family, model, inputs, *args, **kwargs):
    with Skipper(model, SkipPlan(*args, **kwargs)) as skipper:
        out = family.run(model, inputs)
    return out, skipper.stats


@families
def test_blocks_are_found_in_execution_order(family):
    model = family.build()
    blocks = find_blocks(model)
    assert [b.name for b in blocks] == family.block_names
    for i, block in enumerate(blocks):
        assert {"attn", "cross_attn", "mlp"} & set(block.parts) == set(family.parts(i))
        assert ("attn_identity" in block.parts) == bool(family.blocks[i][1].values)
        assert block.name in blocks.describe()


@families
def test_empty_plan_is_bit_equal(family):
    model, inputs = family.build(), family.inputs(2)
    out, stats = skipped(family, model, inputs)
    assert torch.equal(out, family.run(model, inputs))
    assert list(stats.calls) == family.block_names and stats.skipped_fraction == 0


@families
def test_block_skip_equals_the_block_taken_out(family):
    model, inputs = family.build(), family.inputs(2)
    plain = family.run(model, inputs)
    for i in family.layers:
        out, stats = skipped(family, model, inputs, [i])
        assert torch.equal(out, family.run(family.identity_block(model, i), inputs))
        assert not torch.equal(out, plain)
        assert family.block_names[i] not in stats.calls
        assert stats.skipped_fraction == pytest.approx(1 / len(family.block_names))


@families
def test_sublayer_skip_equals_zeroed_output_projection(family):
    model, inputs = family.build(), family.inputs(2)
    plain = family.run(model, inputs)
    for i in family.layers:
        for part in family.parts(i):
            out, stats = skipped(family, model, inputs, [i], part)
            assert torch.equal(out, family.run(family.zeroed(model, i, part), inputs)), (i, part)
            assert not torch.equal(out, plain), (i, part)
            assert 0 < stats.skipped_fraction < 1 / len(family.block_names)


@families
def test_attention_identity_equals_the_reference_by_hand(family):
    model, inputs = family.build(), family.inputs(2)
    plain = family.run(model, inputs)
    for i in family.layers:
        if not family.blocks[i][1].values:
            continue
        out, _ = skipped(family, model, inputs, [i], "attn_identity")
        reference = family.run(family.value_identity(model, i, inputs), inputs)
        torch.testing.assert_close(out, reference, atol=family.slack, rtol=1e-5)
        assert not torch.allclose(out, plain, atol=1e-5)


@families
@pytest.mark.parametrize("part", ["block", "attn", "mlp", "attn_identity"])
def test_rows_that_skip_and_rows_that_stay(family, part):
    """Row 1 of 3 skips: it is the skipped model's row, the others are the plain model's rows."""
    model, inputs = family.build(), family.inputs(3)
    plain = family.run(model, inputs)
    layers = [block.index for block in find_blocks(model) if part in block.parts]
    if not layers:
        pytest.skip(f"{family.name} has no {part}")
    layer = layers[len(layers) // 2]
    every, _ = skipped(family, model, inputs, [layer], part)
    some, _ = skipped(family, model, inputs, [layer], part, rows=[1])
    torch.testing.assert_close(some[[0, 2]], plain[[0, 2]], atol=family.slack, rtol=1e-5)
    torch.testing.assert_close(some[[1]], every[[1]], atol=family.slack, rtol=1e-5)
    full, _ = skipped(family, model, inputs, [layer], part, rows=[0, 1, -1])
    assert torch.equal(full, every)
    none, _ = skipped(family, model, inputs, [layer], part, rows=[])
    assert torch.equal(none, plain)


@families
def test_rows_that_skip_are_not_computed(family):
    model, inputs = family.build(), family.inputs(3)
    with Skipper(model, SkipPlan([1], rows=[0, 2])) as skipper:
        family.run(model, inputs)
    rows = skipper.stats.rows
    assert rows[family.block_names[1]] == 1 and rows[family.block_names[0]] == 3


@families
def test_resume_is_bit_equal_at_equal_batch(family):
    model, inputs = family.build(), family.inputs(2)
    plain = family.run(model, inputs)
    for layer in family.layers:
        prefix = Prefix(layer)
        with capture(model, prefix):
            assert torch.equal(family.run(model, inputs), plain)
        with resume(model, prefix) as skipper:
            assert torch.equal(family.run(model, inputs), plain)
        assert list(skipper.stats.calls) == family.block_names[layer:]


@families
def test_skipped_suffix_equals_skipped_full_pass(family):
    model, inputs = family.build(), family.inputs(2)
    layer, last = 1, len(family.block_names) - 1
    part = next(iter(family.parts(last)), None)
    plan = SkipPlan([layer]) | SkipPlan([last], part=part) if part else SkipPlan([layer])
    prefix = Prefix(layer)
    with capture(model, prefix):
        family.run(model, inputs)
    with Skipper(model, plan):
        full = family.run(model, inputs)
    with Skipper(model, plan, resume=prefix) as skipper:
        assert torch.equal(family.run(model, inputs), full)
    assert list(skipper.stats.calls) == family.block_names[layer + 1 :]


@families
def test_resume_for_some_rows_equals_to_rounding(family):
    model, both = family.build(), family.inputs(2)
    plain = family.run(model, both)
    prefix = Prefix(2)
    with capture(model, prefix):
        family.run(model, both)
    spec = find_blocks(model).spec
    _, second = Arguments(model).rows((), both, slice(1, 2), 2, spec.shared, spec.listed, spec.folded, 0, spec.layered)
    with resume(model, prefix.select(slice(1, 2), 2)):
        out = family.run(model, second)
    torch.testing.assert_close(out, plain[1:], atol=family.slack, rtol=1e-5)


@families
def test_check_passes_on_every_family(family):
    model = family.build()
    report = check(model)
    assert report.blocks == len(family.block_names) and "residue: none" in str(report)
    if not family.thin:
        check(model, family.inputs(2))
