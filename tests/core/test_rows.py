"""Rows that stay run and no others: in any number and layout, in place, and where a block returns another type."""

import pytest
import torch
from helpers.dispatched import Dispatched
from torch import nn

from skipguide.rows import run_rows


@pytest.mark.parametrize("counts", [[0], [2, 3], [0, 1, 2, 3], []])
@pytest.mark.parametrize("projected", [False, True])
def test_run_rows_is_where_without_the_waste(counts, projected):
    torch.manual_seed(0)
    layer, short = nn.Linear(3, 3), nn.Linear(3, 3) if projected else None
    x, seen = torch.randn(4, 3, requires_grad=True), []

    def block(rows):
        seen.append(len(rows))
        return layer(rows)

    out = run_rows(block, x, torch.tensor(counts, dtype=torch.long), short)
    keep = torch.zeros(4, 1, dtype=torch.bool)
    keep[counts] = True
    wanted = torch.where(keep, layer(x), x if short is None else short(x))
    assert torch.allclose(out, wanted, atol=1e-6)
    assert sum(seen) == len(counts)
    grads = [torch.autograd.grad(o.square().sum(), x, retain_graph=True)[0] for o in (out, wanted)]
    assert torch.allclose(*grads, atol=1e-5)


@pytest.mark.parametrize("counts", [[0], [3], [1, 2], [0, 2, 3], [0, 1, 2, 3], []])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_large_rows_go_by_slices_and_keep_their_layout(counts, projected, layout):
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 16, 3, padding=1).to(memory_format=layout)
    short = nn.Conv2d(16, 16, 1).to(memory_format=layout) if projected else None
    x, seen = torch.randn(4, 16, 16, 16).to(memory_format=layout), []

    def block(rows):
        assert rows.is_contiguous(memory_format=layout)
        seen.append(len(rows))
        return conv(rows)

    out = run_rows(block, x.requires_grad_(), counts, short)
    keep = torch.zeros(4, 1, 1, 1, dtype=torch.bool)
    keep[counts] = True
    wanted = torch.where(keep, conv(x), x if short is None else short(x))
    assert torch.allclose(out, wanted, atol=1e-5) and out.is_contiguous(memory_format=layout)
    assert sum(seen) == len(counts)
    (mine,) = torch.autograd.grad(out.square().sum(), x)
    (theirs,) = torch.autograd.grad(wanted.square().sum(), x)
    assert torch.allclose(mine, theirs, atol=1e-3)
    with torch.no_grad():
        half = run_rows(lambda rows: conv(rows).bfloat16(), x, torch.tensor(counts, dtype=torch.long), short)
    assert half.dtype is (torch.bfloat16 if counts else torch.float32), "as the block returns it"


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("width", [3, 8192], ids=["small", "large"])
@pytest.mark.parametrize("back", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_type_is_the_blocks_and_only_what_is_ours_is_written_to(width, projected, own, back):
    """Rows 0, 2 and 3 of five; autocast lets a block return another type than it was given."""
    torch.manual_seed(0)
    x = torch.randn(5, width)
    before, keep = x.clone(), torch.tensor([True, False, True, True, False])[:, None]
    short = (lambda rows: 3 * rows) if projected else None
    out = run_rows(lambda rows: (2 * rows).to(back), x, [0, 2, 3], short, own)
    assert torch.equal(out, torch.where(keep, 2 * before, before if short is None else 3 * before).to(back))
    assert out.dtype is back
    assert own or torch.equal(x, before)


@torch.no_grad()
def test_nothing_waits_for_the_device_to_know_the_rows():
    """On a GPU that is; a batch this small goes the same way on the CPU."""
    layer, x = nn.Linear(3, 3), torch.randn(4, 3)
    for shortcut in (None, nn.Linear(3, 3)):
        with Dispatched() as ran:
            run_rows(layer, x, [1, 3], shortcut)
        assert "index_select" in ran.names and not ran.waits
