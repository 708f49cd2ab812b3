"""The router: rows that a decision leaves out are not computed, and no trace stays."""

import contextvars
import copy
import threading

import pytest
import torch
from helpers.residue import agrees
from helpers.tiny_resnet import resnet
from torch import nn

from skipguide import LostGateError, SkipError, Skipper, SkipPlan, find_blocks
from skipguide.router import Router


def residue(model):
    return [(n, sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]


def by_hand(model, x, keep):
    """Every row by itself, on a copy of the network whose skipped blocks are really taken out."""
    rows = []
    for row, decisions in zip(x, keep, strict=True):
        other = copy.deepcopy(model)
        for block, runs in zip(find_blocks(other), decisions, strict=True):
            if not runs:
                parent, _, leaf = block.name.rpartition(".")
                short = block.module.downsample
                other.get_submodule(parent)[int(leaf)] = nn.Identity() if short is None else short
        rows.append(other(row[None]))
    return torch.cat(rows)


@torch.no_grad()
def test_no_blocks_to_route_is_the_model():
    model, x = resnet(), torch.randn(2, 3, 40, 40)
    wanted = model(x)
    with Router(model, []).running(lambda place, rows: pytest.fail("nothing is asked")):
        assert torch.equal(model(x), wanted)


def test_decisions_per_row_equal_the_blocks_taken_out():
    model, x = resnet(), torch.randn(6, 3, 40, 40)
    keep = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    before = residue(model)
    with torch.no_grad(), Router(model).running(lambda place, rows: keep[:, place]) as stats:
        out = model(x)
    with torch.no_grad():
        assert torch.allclose(out, by_hand(model, x, keep), atol=1e-5)
    assert [stats.rows.get(b.name, 0) for b in find_blocks(model)] == keep.sum(0).tolist()
    assert residue(model) == before


@pytest.mark.parametrize("all_rows", [True, False])
def test_open_gates_are_bit_equal_and_closed_ones_call_nothing(all_rows):
    model, x = resnet(), torch.randn(3, 3, 32, 32)
    ran = []
    handles = [b.module.conv1.register_forward_hook(lambda *a: ran.append(1)) for b in find_blocks(model)]
    with torch.no_grad(), Router(model).running(lambda place, rows: torch.full((3,), all_rows)) as stats:
        out = model(x)
    for handle in handles:
        handle.remove()
    assert len(ran) == (5 if all_rows else 0)
    if all_rows:
        assert torch.equal(out, model(x))
    else:
        assert stats.skipped_fraction == 1.0


def test_float_decisions_blend_and_pass_gradients():
    model, x = resnet(), torch.randn(2, 3, 32, 32)
    weight = torch.tensor([0.0, 1.0], requires_grad=True)
    with Router(model).running(lambda place, rows: weight):
        out = model(x)
    closed, opened = (by_hand(model, x, torch.full((2, 5), value)) for value in (False, True))
    assert torch.allclose(out[0], closed[0], atol=1e-5) and torch.allclose(out[1], opened[1], atol=1e-5)
    out.sum().backward()
    assert weight.grad.abs().min() > 0


def test_a_projection_counts_a_batch_once():
    model = resnet().train()
    with Router(model).running(lambda place, rows: torch.ones(4)):
        model(torch.randn(4, 3, 32, 32))
    assert int(model.layer2[0].downsample[1].num_batches_tracked) == 1
    assert int(model.layer2[0].bn1.num_batches_tracked) == 1


def test_plans_compose_with_routes():
    model, x = resnet(), torch.randn(4, 3, 32, 32)
    keep = torch.tensor([[True, True, False, True, True]] * 2 + [[True] * 5] * 2)
    both = keep.clone()
    both[1:3, 1] = False
    with (
        torch.no_grad(),
        Skipper(model, SkipPlan([1], rows=[1, 2])),
        Router(model).running(lambda place, rows: keep[:, place]),
    ):
        out = model(x)
    with torch.no_grad():
        assert torch.allclose(out, by_hand(model, x, both), atol=1e-5)


def test_no_trace_after_an_exception():
    model, x = resnet(), torch.randn(2, 3, 32, 32)
    before = residue(model)
    with pytest.raises(ZeroDivisionError), Router(model).running(lambda place, rows: 1 // 0):
        model(x)
    assert residue(model) == before
    for wrong in (torch.ones(3, dtype=torch.bool), torch.ones(2, dtype=torch.long), torch.ones(2, 1)):
        with pytest.raises(SkipError, match="one per batch row"), Router(model).running(lambda place, rows: wrong):  # noqa: B023
            model(x)
    assert residue(model) == before


def test_threads_do_not_see_each_other():
    model, x = resnet(), torch.randn(2, 3, 32, 32)
    plain, out = model(x), {}

    def work(name, keep):
        with torch.no_grad(), Router(model).running(lambda place, rows: keep):
            for _ in range(5):
                out[name] = model(x)

    decisions = {"open": torch.ones(2, dtype=torch.bool), "shut": torch.zeros(2, dtype=torch.bool)}
    threads = [threading.Thread(target=work, args=item) for item in decisions.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert agrees(out["open"], plain) and not agrees(out["shut"], plain)


def test_threads_with_a_copied_context_do_not_see_each_other():
    """Both are inside every block at once, where each has projected its own input already."""
    model, x = resnet(), {n: torch.randn(n, 3, 32, 32) for n in (1, 3)}
    barrier, found = threading.Barrier(2, timeout=600), {}

    def meet(module, args):
        barrier.wait()

    hooks = [block.module.conv2.register_forward_pre_hook(meet) for block in find_blocks(model)]

    def work(n):
        found[n] = model(x[n])

    def halves(place, rows):
        return torch.full((len(rows),), 0.5)

    with Router(model).running(halves) as stats:
        threads = [threading.Thread(target=contextvars.copy_context().run, args=(work, n)) for n in x]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert stats.passes == 2 and set(stats.rows.values()) == {4}
    for hook in hooks:
        hook.remove()
    for n in x:
        with Router(model).running(halves):
            assert agrees(found[n], model(x[n]))


def test_models_with_several_streams_are_refused():
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    with pytest.raises(SkipError, match="one stream"):
        Router(model)


def test_a_lost_gate_is_noticed():
    model, x = resnet(), torch.randn(2, 3, 32, 32)
    router = Router(model)
    with router.running(lambda place, rows: None):
        model.layer2[0].forward = lambda rows: rows[:, :, ::2, ::2].repeat(1, 2, 1, 1)
        with pytest.raises(LostGateError, match=r"layer2\.0"):
            model(x)
    del model.layer2[0].forward


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("decision", [torch.tensor([True, False, True]), torch.tensor([0.25, 1.0, 0.0])])
def test_decisions_may_stay_on_the_cpu(decision):
    model, x = resnet().cuda(), torch.randn(3, 3, 32, 32).cuda()
    found = []
    for given in (decision, decision.cuda()):
        with torch.no_grad(), Router(model).running(lambda place, rows, given=given: given):
            found.append(model(x))
    assert torch.equal(*found)
