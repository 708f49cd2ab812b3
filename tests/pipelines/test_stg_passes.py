"""DenoiserPasses: what is kept ready for a step, and the checks on what its forwards return."""

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from helpers.residue import no_gates

from skipguide import NoEffectError, SkipError, SkipPlan
from skipguide.pipelines.sampling.ledger import GuidanceStats
from skipguide.pipelines.sampling.passes import KEPT, DenoiserPasses
from skipguide.pipelines.sampling.predictions import check_effect, first, with_first
from zoo.pipes import BY_PIPE

PLAN = SkipPlan([1])


def test_a_skip_that_did_nothing_or_broke_the_numbers_is_refused():
    plain = torch.randn(2, 8)
    check_effect(plain, plain + 1e-3, PLAN)
    for dtype in (torch.float32, torch.float64):
        same = plain.to(dtype)
        for skipped in (same, same + 1e-6 * same.abs().max()):  # another batch size moves the last bits
            with pytest.raises(NoEffectError, match=r"skipping layers \[1\] \(block\) did not change"):
                check_effect(same, skipped, PLAN)
        check_effect(same, same + 4e-6 * same.abs().max(), PLAN)
    half = torch.ones(2, 8, dtype=torch.float16)
    check_effect(half, half + 1e-3, PLAN)  # its last bit
    with pytest.raises(NoEffectError):
        check_effect(half, half.clone(), PLAN)
    for wrong in (float("nan"), float("inf")):
        broken = plain.clone()
        broken[1, 3] = wrong
        with pytest.raises(SkipError, match="the denoiser's plain prediction is not finite"):
            check_effect(broken, plain, PLAN)
        with pytest.raises(SkipError, match=r"without layers \[1\] is not finite"):
            check_effect(plain, broken, PLAN)


def test_the_prediction_in_every_kind_of_output():
    old, new, more = torch.zeros(2, 3), torch.ones(2, 3), torch.full((1,), 5.0)
    for out in (old, (old,), (old, more), (list(old), more), Transformer2DModelOutput(sample=old)):
        assert torch.equal(first(out), old)
        made = with_first(out, new)
        assert type(made) is type(out) and torch.equal(first(made), new)
        if isinstance(out, tuple):
            assert type(made[0]) is type(out[0]) and made[1:] == out[1:]


def test_paths_used_last_are_kept_and_the_others_leave_nothing():
    model = BY_PIPE["ltx"].build().transformer
    passes = DenoiserPasses(model, True, GuidanceStats())
    passes.install()
    drawn = [SkipPlan([1], rows=[row]) for row in range(KEPT + 2)]
    old = passes.prepared([drawn[0]])
    for plan in drawn[1:KEPT]:
        passes.prepared([plan])
    held = len(passes._installed)
    assert passes.prepared([drawn[0], drawn[0]]) is old, "the same plans; used again"
    for plan in drawn[KEPT:]:
        passes.prepared([plan])
    assert len(passes._installed) == held and len(passes._prepared) == KEPT
    assert passes.prepared([drawn[0]]) is old
    ready = set(passes._prepared)
    assert (drawn[1],) not in ready and (drawn[2],) not in ready and (drawn[3],) in ready
    before = list(passes._installed)
    passes.pause()
    assert not passes._installed
    no_gates(model)
    passes.reinstall()
    assert passes._installed == before, "in the same order"
    passes.remove()
    assert not passes._prepared and not passes._installed
    no_gates(model)
