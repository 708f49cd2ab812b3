"""What a skipper notes: the prefix that a pass captured, and the ledger of what ran."""

import json

import pytest
import torch
from helpers.residue import Watch
from helpers.tiny_resnet import resnet
from torch import nn

from skipguide import SkipError, Skipper, SkipPlan, find_blocks
from skipguide.prefix import Prefix
from skipguide.router import Router
from skipguide.skipper import capture, resume
from zoo import BY_NAME

# A prefix: what a pass captured, for some rows, filled from another and let go of.


def prefix():
    """Three clips; the stream `frames` folds two frames into the batch."""
    clips, frames = torch.arange(3.0)[:, None], torch.arange(6.0)[:, None]
    return Prefix(2, {"clips": clips, "frames": frames, "none": None}, {"block.0": (clips, [frames, None])})


def test_some_rows_as_views():
    whole = prefix()
    some = whole.select(slice(1, 3), 3)
    assert some.layer == 2
    assert some.streams["clips"].flatten().tolist() == [1, 2]
    assert some.streams["frames"].flatten().tolist() == [2, 3, 4, 5]
    assert some.streams["none"] is None
    clips, (frames, none) = some.kept["block.0"]
    assert clips.flatten().tolist() == [1, 2] and frames.flatten().tolist() == [2, 3, 4, 5] and none is None
    assert isinstance(some.kept["block.0"], tuple) and isinstance(some.kept["block.0"][1], list)
    assert some.streams["clips"].data_ptr() == whole.streams["clips"][1:].data_ptr(), "nothing is copied"
    last = whole.select(slice(-1, None), 3)
    assert last.streams["frames"].flatten().tolist() == [4, 5]


def test_filled_and_let_go_of():
    whole, other = prefix(), Prefix(2)
    other.fill(whole)
    assert other.streams == whole.streams and other.kept == whole.kept
    whole.clear()
    assert not whole.streams and not whole.kept
    assert len(other.streams) == 3 and len(other.kept) == 1


def test_nothing_was_captured():
    empty = Prefix(4)
    for use in (lambda: empty.select(slice(0, 1), 1), lambda: resume(nn.Linear(1, 1), empty)):
        with pytest.raises(SkipError, match="nothing was captured at block 4: run the model once inside capture"):
            use()


# The core's ledger: what ran and what was left out, in times and in batch rows.


@pytest.mark.parametrize(("rows", "left"), [(None, 3), ([1], 1), ([0, -1], 2)])
def test_a_plan_for_some_rows_counts_those_rows(rows, left):
    watch = Watch(BY_NAME["ltx"], batch=3)
    blocks = [block.name for block in find_blocks(watch.model)]
    with Skipper(watch.model, SkipPlan([1], rows=rows)) as skipper:
        watch.run()
        watch.run()
    stats = skipper.stats
    assert stats.skips == {blocks[1]: 2} and stats.skipped_rows == {blocks[1]: 2 * left}
    assert stats.rows.get(blocks[1], 0) == 2 * (3 - left)
    assert stats.skipped_fraction == pytest.approx(left / (3 * len(blocks)))
    assert json.loads(json.dumps(stats.to_dict()))["skipped_rows"] == stats.skipped_rows


@torch.no_grad()
def test_rows_that_gates_close_are_left_out_too():
    model, x = resnet(), torch.randn(4, 3, 32, 32)
    keep = torch.tensor([[True] * 5, [False] * 5, [True, False] * 2 + [True], [False, True] * 2 + [False]])
    with Router(model).running(lambda place, rows: keep[:, place]) as stats:
        model(x)
    assert [stats.skipped_rows.get(block.name, 0) for block in find_blocks(model)] == (~keep).sum(0).tolist()
    assert stats.skipped_fraction == pytest.approx(float((~keep).float().mean()))


@torch.no_grad()
def test_blocks_that_are_called_without_their_model_count_as_calls():
    model, x = resnet(), torch.randn(2, 64, 8, 8)
    with Skipper(model, SkipPlan([0])) as skipper:
        model.layer1(x)
        model.layer2(x)
    assert skipper.stats.skipped_fraction == pytest.approx(1 / 3)


def test_a_plan_may_leave_out_the_block_that_is_resumed():
    """What lies before it does not run, so no plan can leave it out; the block itself and later ones may be."""
    family = BY_NAME["ltx"]
    model, inputs = family.build(), family.inputs(2)
    captured = Prefix(2)
    with capture(model, captured):
        family.run(model, inputs)
    with Skipper(model, SkipPlan([2])):
        expected = family.run(model, inputs)
    with Skipper(model, SkipPlan([2]), resume=captured):
        assert torch.equal(family.run(model, inputs), expected)
    with pytest.raises(SkipError, match="skips block 1, which does not run when resuming from block 2"):
        Skipper(model, SkipPlan([1, 2]), resume=captured)


@pytest.mark.parametrize("rows", [[0], 0, None, (0, 1)])
def test_rows_of_a_prefix_are_a_slice(rows):
    with pytest.raises(SkipError, match="expected a slice of the batch"):
        prefix().select(rows, 3)
