"""What skip guidance costs: nothing at scale zero, what was foretold, few calls a step, and the passes of a step."""

import diffusers
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from helpers.call_counter import CallCounter
from helpers.residue import no_gates
from helpers.stg_reference import LAYER, WITH_CFG, close, guided, named

from skipguide import NoEffectError, SkipError, SkipPlan
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from skipguide.pipelines.sampling.ledger import GuidanceStats
from skipguide.pipelines.sampling.passes import KEPT, DenoiserPasses
from skipguide.pipelines.sampling.predictions import check_effect, first, with_first
from zoo.pipes import BY_PIPE, PIPES

# What skip guidance costs: nothing at scale zero, what was foretold, less with the prefix used again.


@named(WITH_CFG)
def test_prefix_reuse_changes_nothing_but_the_cost(case):
    out, stats = guided(case, Stg([LAYER, 2]), prompts=1)
    full, naive = guided(case, Stg([LAYER, 2], prefix_reuse=False), prompts=1)
    close(out, full)
    if case.cfg_modes[0] == "two_calls":
        assert torch.equal(out, full)
    assert naive.blocks_run - stats.blocks_run == 3 * LAYER


@named(PIPES)
def test_scale_zero_is_bit_equal_and_free(case):
    pipe = case.build()
    plain = case.run(pipe)
    with Stg([LAYER], scale=0).apply(pipe) as applied:
        assert torch.equal(case.run(pipe), plain)
    assert applied.stats.blocks_run == applied.stats.blocks_plain == applied.stats.blocks_naive


@named(PIPES)
def test_cost_is_foretold(case):
    pipe = case.build()
    for stg in (Stg([LAYER, 3]), Stg([LAYER], part="attn"), Stg([2], prefix_reuse=False)):
        cost = stg.cost(pipe, guidance=case in WITH_CFG)
        with stg.apply(pipe) as applied:
            case.run(pipe)
        assert applied.stats.blocks_run == 3 * cost.blocks_per_step
        assert applied.stats.blocks_naive == 3 * cost.blocks_naive
        assert applied.stats.to_dict()["blocks_plain"] == 3 * cost.blocks_plain


@pytest.mark.parametrize("steps", [0, -1, 2.5])
def test_a_cost_is_of_some_steps(steps):
    with pytest.raises(SkipError, match="steps as a whole number of at least 1"):
        Stg([1]).cost(BY_PIPE["ltx"].build(), steps=steps)


# What a guided step costs in Python, counted: the calls into our files, which are the same on every machine.

BLOCKS, DEEP, STEPS, WARM = 28, 19, 5, 1
MOST = 700


def long_ltx():
    """LTXPipeline with as many blocks as the released model has."""
    pipe = BY_PIPE["ltx"].build()
    config = dict(pipe.transformer.config) | {"num_layers": BLOCKS}
    torch.manual_seed(0)
    model = diffusers.LTXVideoTransformer3DModel.from_config(config).eval()
    for parameter in model.parameters():  # the tables that modulate a block start at nearly nothing
        torch.nn.init.normal_(parameter, std=0.1)
    pipe.transformer = model
    return pipe


def test_a_guided_step_takes_few_calls():
    case, pipe, counts = BY_PIPE["ltx"], long_ltx(), []
    with Stg([DEEP]).apply(pipe), CallCounter() as counter:

        def after(*_):
            counts.append(counter.calls.copy())
            return {}

        case.run(pipe, num_inference_steps=STEPS, callback_on_step_end=after)
    counts.pop()  # the last step also reads whether the predictions of all steps were finite
    steps = [later - earlier for earlier, later in zip(counts[WARM:], counts[WARM + 1 :], strict=False)]
    assert all(step == steps[0] for step in steps), "every step makes the same calls"
    assert steps[0].total() <= MOST, "\n".join(f"{number:5} {place}" for place, number in steps[0].most_common())


# DenoiserPasses: what is kept ready for a step, and the checks on what its forwards return.

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
    held = len(passes._standing._installed)
    assert passes.prepared([drawn[0], drawn[0]]) is old, "the same plans; used again"
    for plan in drawn[KEPT:]:
        passes.prepared([plan])
    assert len(passes._standing._installed) == held and len(passes._prepared) == KEPT
    assert passes.prepared([drawn[0]]) is old
    ready = set(passes._prepared)
    assert (drawn[1],) not in ready and (drawn[2],) not in ready and (drawn[3],) in ready
    before = list(passes._standing._installed)
    passes.pause()
    assert not passes._standing._installed
    no_gates(model)
    passes.reinstall()
    assert passes._standing._installed == before, "in the same order"
    passes.remove()
    assert not passes._prepared and not passes._standing._installed
    no_gates(model)
