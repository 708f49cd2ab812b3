"""Plans: plain data, union, windows, JSON, and errors that come at once."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipguide import Schedule, SkipError, Skipper, SkipPlan
from skipguide.plan import PARTS
from zoo import BY_NAME

quick = settings(max_examples=60, deadline=None)  # a busy machine is not an error
layers = st.lists(st.integers(0, 60), unique=True, max_size=6)
windows = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted).filter(lambda w: w[0] < w[1])


@st.composite
def terms(draw):
    start, stop = draw(windows)
    rows = draw(st.none() | st.lists(st.integers(-4, 4), unique=True, max_size=4))
    stack = draw(st.none() | st.sampled_from(["blocks", "single_transformer_blocks"]))
    return SkipPlan(draw(layers), draw(st.sampled_from(PARTS)), stack, rows, start, stop)


plans = st.lists(terms(), min_size=1, max_size=4).map(lambda ts: SkipPlan._of(dict.fromkeys(ts)))


@quick
@given(plans)
def test_json_round_trip(plan):
    assert SkipPlan.from_dict(plan.to_dict()) == plan
    assert SkipPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert hash(SkipPlan.from_dict(plan.to_dict())) == hash(plan)


@quick
@given(plans, plans, plans)
def test_union_is_associative_and_idempotent(a, b, c):
    assert (a | b) | c == a | (b | c)
    assert a | a == a and (a | b) | b == a | b
    assert set((a | b).terms) == set(a.terms) | set(b.terms)
    assert (a | b).empty == (a.empty and b.empty)


@quick
@given(windows, st.integers(1, 60))
def test_a_window_is_one_run_of_steps(window, steps):
    schedule = Schedule(*window)
    active = [i for i in range(steps) if schedule.active(i, steps)]
    assert active == list(range(active[0], active[-1] + 1)) if active else True
    slack = 1.01e-6  # 0.3 as a float32 is 0.3
    assert all(window[0] - slack <= i / steps <= window[1] for i in active)


@quick
@given(st.integers(1, 40), st.integers(0, 40), st.integers(1, 40), st.integers(1, 7))
def test_windows_at_whole_steps_are_exact(steps, first, count, every):
    """Half-open, whatever the last bit of the division is; two windows that meet share no step."""
    first, last = first % steps, min(first % steps + count, steps)
    schedule = Schedule(first / steps, last / steps, every)
    assert [i for i in range(steps) if schedule.active(i, steps)] == list(range(first, last))
    assert [i for i in range(steps) if schedule.fresh(i, steps)] == list(range(first, last, every))


@pytest.mark.parametrize("window", [(math.nan, 1.0), (0.0, math.nan), (0.5, 0.5), (0.6, 0.5), (-0.1, 1), (0, 1.1),
                                    (0, math.inf)])  # fmt: skip
def test_windows_that_are_none(window):
    for make in (Schedule, lambda start, stop: SkipPlan([1], start=start, stop=stop)):
        with pytest.raises(SkipError, match=r"start and stop are fractions"):
            make(*window)


@pytest.mark.parametrize(("bad", "says"), [
    ({"layers": [1, 1]}, "names a block twice"),
    ({"layers": [True]}, "block numbers"),
    ({"layers": True}, "block numbers"),
    ({"layers": [1.0]}, "block numbers"),
    ({"layers": ["1"]}, "block numbers"),
    ({"layers": [1], "part": "attention"}, "unknown part 'attention'; expected one of block, attn"),
    ({"layers": [1], "rows": [0, 0]}, "twice"),
    ({"layers": [1], "rows": [False]}, "whole numbers"),
    ({"layers": [1], "rows": torch.tensor([False, True])}, "whole numbers"),
    ({"layers": torch.tensor([1.5])}, "whole numbers"),
    ({"layers": [1], "start": None}, "start and stop are fractions"),
    ({"layers": [1], "stop": "1"}, "start and stop are fractions"),
])  # fmt: skip
def test_bad_plans_are_refused_when_they_are_made(bad, says):
    with pytest.raises(SkipError, match=says):
        SkipPlan(**bad)
    term = {"start": 0.0, "stop": 1.0, **bad}
    with pytest.raises(SkipError, match=says):
        SkipPlan.from_dict({"version": 1, "terms": [term]})


def test_layers_may_be_one_number_or_a_tensor_of_them():
    assert SkipPlan(3) == SkipPlan([3]) == SkipPlan(torch.tensor([3])) == SkipPlan(range(3, 4))
    assert SkipPlan(3) == SkipPlan(np.int64(3)) == SkipPlan(torch.tensor(3)) == SkipPlan([np.int8(3)])
    assert json.loads(json.dumps(SkipPlan(3, start=np.float32(0.5)).to_dict()))["terms"][0]["start"] == 0.5


@pytest.mark.parametrize(("data", "says"), [
    ({"terms": [{"layers": [1]}]}, "version None"),
    ({"version": 2, "terms": []}, "version 2"),
    ({"version": 1, "terms": [], "colour": 1}, "unknown keys in a plan: .'colour'"),
    ({"version": 1, "terms": [{"layer": [1]}]}, "unknown keys in a plan's term: .'layer'"),
    ({"version": 1, "terms": []}, "at least one term"),
    ({"version": 1, "terms": [5]}, "list of mappings"),
    ({"version": 1, "terms": {"layers": [1]}}, "list of mappings"),
])  # fmt: skip
def test_bad_files_are_refused(data, says):
    with pytest.raises(SkipError, match=says):
        SkipPlan.from_dict(data)


def test_saving_keeps_what_is_there(tmp_path):
    path = tmp_path / "plan.json"
    plan = SkipPlan([3, 5]) | SkipPlan([7], "mlp", rows=[-1])
    plan.save_json(path)
    with pytest.raises(SkipError, match="overwrite=True"):
        SkipPlan([1]).save_json(path)
    assert SkipPlan.load_json(path) == plan
    SkipPlan([1]).save_json(path, overwrite=True)
    assert SkipPlan.load_json(path) == SkipPlan([1])
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    SkipPlan([1]).save_json(path)

    def breaks(self, text, **kwargs):
        self.write_bytes(text[:10].encode())
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", breaks)
    with pytest.raises(OSError, match="disk full"):
        SkipPlan([2]).save_json(path, overwrite=True)
    monkeypatch.undo()
    assert SkipPlan.load_json(path) == SkipPlan([1])
    assert list(tmp_path.iterdir()) == [path]


# -- on a model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("plan", "says"), [
    (SkipPlan([4]), r"layer 4 is out of range: LTXVideoTransformer3DModel has 4 blocks, 0 to 3"),
    (SkipPlan([-1]), "layer -1 is out of range"),
    (SkipPlan([1], stack="single_blocks"), r"no stack 'single_blocks'; its stacks are transformer_blocks"),
    (SkipPlan([1]) | SkipPlan([9], "mlp"), "layer 9 is out of range"),
])  # fmt: skip
def test_plans_that_do_not_fit_are_refused_before_anything_is_touched(plan, says):
    model = BY_NAME["ltx"].build()
    with pytest.raises(SkipError, match=says):
        Skipper(model, plan)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_part_that_the_block_lacks():
    with pytest.raises(SkipError, match=r"block 1 of Mochi.*no part 'cross_attn'.*It has block, attn"):
        Skipper(BY_NAME["mochi"].build(), SkipPlan([1], "cross_attn"))


def test_layers_count_within_a_stack():
    family = BY_NAME["flux"]
    model, inputs = family.build(), family.inputs(1)
    outs = []
    for plan in (SkipPlan([4]), SkipPlan([1], stack="single_transformer_blocks")):
        with Skipper(model, plan) as skipper:
            outs.append(family.run(model, inputs))
        assert skipper.stats.skips == {"single_transformer_blocks.1": 1}
    assert torch.equal(*outs)


@pytest.mark.parametrize("rows", [[2], [-3], [0, 5]])
def test_rows_out_of_range(rows):
    family = BY_NAME["ltx"]
    model = family.build()
    with (
        pytest.raises(SkipError, match=r"rows .* are out of range for a batch of 2"),
        Skipper(model, SkipPlan([1], rows=rows)),
    ):
        family.run(model, family.inputs(2))


def test_windows_follow_the_progress():
    family = BY_NAME["ltx"]
    model, inputs = family.build(), family.inputs(1)
    plain = family.run(model, inputs)
    with Skipper(model, SkipPlan([1])):
        first = family.run(model, inputs)
    with Skipper(model, SkipPlan([2], "mlp")):
        second = family.run(model, inputs)
    plan = SkipPlan([1], start=0.2, stop=0.5) | SkipPlan([2], "mlp", start=0.5)
    with Skipper(model, plan) as skipper:
        with pytest.raises(SkipError, match=r"set skipper\.progress"):
            family.run(model, inputs)
        for step in range(10):
            skipper.progress = step / 10
            expected = plain if step < 2 else first if step < 5 else second
            assert torch.equal(family.run(model, inputs), expected), step
        assert skipper.progress == 0.9
        for nothing in (math.nan, -0.1, 1.1, None, "half"):
            with pytest.raises(SkipError, match="0 to 1"):
                skipper.progress = nothing
        assert skipper.progress == 0.9


def test_the_share_left_out_does_not_depend_on_what_a_closed_window_ran():
    """A sublayer that runs because its window is closed is a part of its block, not a further block."""
    family = BY_NAME["ltx"]
    model, inputs = family.build(), family.inputs(1)
    with Skipper(model, SkipPlan([1], "attn", start=0.5)) as skipper:
        for skipper.progress in (0.0, 0.5):
            family.run(model, inputs)
    with Skipper(model, SkipPlan([1], "attn")) as always:
        family.run(model, inputs)
    assert skipper.stats.skipped_fraction == pytest.approx(always.stats.skipped_fraction / 2)


@pytest.mark.parametrize("plan", [None, [1], 1])
def test_what_is_no_plan_is_refused(plan):
    with pytest.raises(SkipError, match="expected a SkipPlan"):
        Skipper(BY_NAME["ltx"].build(), plan)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["block", "attn", "mlp", "cross_attn"])), max_size=5))
def test_a_union_leaves_out_what_its_parts_leave_out(pairs):
    """A union in one plan, and its terms as nested plans, are the same model."""
    model, inputs, run = _LTX.model, _LTX.inputs, _LTX.family.run
    union = SkipPlan()
    for layer, part in pairs:
        union |= SkipPlan([layer], part)
    from contextlib import ExitStack

    with Skipper(model, union):
        together = run(model, inputs)
    with ExitStack() as stack:
        for layer, part in pairs:
            stack.enter_context(Skipper(model, SkipPlan([layer], part)))
        assert torch.equal(run(model, inputs), together)


class _LTX:
    family = BY_NAME["ltx"]
    model, inputs = family.build(), family.inputs(1)
