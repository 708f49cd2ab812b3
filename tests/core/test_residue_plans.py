"""Several plans on one model add up, and leave no trace in whatever order they end."""

import pytest
import torch
from helpers.residue import Watch, families

from skipguide import Skipper, SkipPlan, find_blocks
from zoo import BY_NAME


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
