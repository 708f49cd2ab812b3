"""The core's ledger: what ran and what was left out, in times and in batch rows."""

import json

import pytest
import torch
from helpers.residue import Watch
from helpers.tiny_resnet import resnet

from skipguide import Skipper, SkipPlan, find_blocks
from skipguide.router import Router
from zoo import BY_NAME


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
