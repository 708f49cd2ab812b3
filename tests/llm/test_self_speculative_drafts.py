"""Drafts of self-speculative decoding: which sublayers they leave out, how long they are, by which plans."""

import pytest
import torch
from helpers.llm_zoo import BY_NAME, prompt

from skipguide import Skipper, SkipPlan
from skipguide.errors import SkipError
from skipguide.llm import SelfSpeculative, SublayerPlan, SublayerStats
from skipguide.llm.cost import SublayerCosts
from skipguide.llm.speculative.acceptance import Calibration, Controller, best_length, speedup, tokens_per_round
from skipguide.llm.speculative.drafter import choose_drafter

# Self-speculative drafts: which sublayers they leave out, how long they are, and when there are none.


def test_the_drafter_goes_by_similarity_per_millisecond():
    stats = SublayerStats((0.90, 0.95, 0.99), (0.80, 0.97, 0.98), (1.0,) * 3, (1.0,) * 3)
    cheap = choose_drafter(stats, SublayerCosts((3.0,) * 3, (1.0,) * 3, 0.0, 64), share=0.25)
    assert (cheap.attn, cheap.mlp) == ((2,), ()), "attention is dear here"
    dear = choose_drafter(stats, SublayerCosts((1.0,) * 3, (3.0,) * 3, 0.0, 64), share=0.25)
    assert (dear.attn, dear.mlp) == ((), (2,)), "the MLP is dear here"
    kept = choose_drafter(stats, SublayerCosts((3.0,) * 3, (1.0,) * 3, 0.0, 64), share=0.25, keep_attn=[2])
    assert 2 not in kept.attn
    nearly_all = choose_drafter(
        SublayerStats((0.99, 0.98, 0.99), (0.1,) * 3, (1.0,) * 3, (1.0,) * 3),
        SublayerCosts((1.0,) * 3, (1.0,) * 3, 0.0, 64),
        share=0.5,
    )
    assert nearly_all.attn == (0, 2), "one attention stays, the one that does most"


def test_the_analytic_speedup_of_the_specification():
    for acceptance, cost, expected in ((0.9, 0.5, 1.35), (0.9, 0.6, 1.21), (0.95, 0.4, 1.75), (0.95, 0.5, 1.49)):
        assert best_length(acceptance, cost)[1] == pytest.approx(expected, abs=0.006)
    assert best_length(0.7, 0.6)[1] < 1.04
    assert speedup(1.0, 4, 0.5, 1.0) == pytest.approx(5 / 3)
    assert tokens_per_round(0.0, 5) == 1


def rounds(controller, count, confidence, accepted, draft, verify):
    for _ in range(count):
        controller.round([confidence] * 4, accepted, 4 * draft, verify)


def test_drafting_goes_on_where_it_pays_and_stops_where_it_does_not():
    good = Controller()
    assert good.next_length() == 0, "a plain step first: what does one cost?"
    for _ in range(2):
        good.plain_step(1.0)
    rounds(good, 20, 0.9, 4, 0.3, 1.1)
    assert not good.off and good.next_length() > 0
    bad = Controller(retry=5)
    for _ in range(2):
        bad.plain_step(1.0)
    rounds(bad, 6, 0.9, 0, 0.6, 1.1)
    assert bad.off and bad.switched_off == 1 and bad.next_length() == 0
    for _ in range(5):
        bad.plain_step(1.0)
    assert bad.next_length() > 0, "the text may have become easier"
    rounds(bad, 6, 0.9, 0, 0.6, 1.1)
    assert bad.switched_off == 2


def test_the_next_request_begins_with_what_the_last_one_learned():
    bad = Controller(retry=5)
    for _ in range(2):
        bad.plain_step(1.0)
    rounds(bad, 6, 0.9, 0, 0.6, 1.1)
    following = bad.again()
    assert following.next_length() == 0 and following.switched_off == 0
    for _ in range(5):
        following.plain_step(1.0)
    assert following.next_length() > 0, "each request tries for itself"
    good = Controller()
    for _ in range(2):
        good.plain_step(1.0)
    rounds(good, 6, 0.9, 4, 0.3, 1.1)
    assert good.again().next_length() > 0, "no plain steps are needed first"
    assert good.again().draft_cost == good.draft_cost


def test_the_exit_goes_by_what_a_confidence_was_worth():
    controller = Controller()
    controller.plain_step(1.0)
    controller.plain_step(1.0)
    for _ in range(30):
        controller.round([0.99], 1, 0.3, 1.0)
        controller.round([0.3], 0, 0.3, 1.0)
    assert controller.worth_going_on([0.99]) != controller.worth_going_on([0.3])
    assert not controller.worth_going_on([0.3])
    unsure = Calibration()
    for _ in range(50):
        unsure.enter(0.1, True)
    assert unsure.chance(0.1) > 0.95, "an unsure drafter that is always right is trusted"


# A plan of the core is a plan of sublayers too: for a drafter, and in the phases of a language model.

PLAN = SkipPlan([1], part="attn") | SkipPlan([2], part="mlp") | SkipPlan([2])
CALL = {"inputs": prompt(1, 7), "max_new_tokens": 10, "do_sample": False}


def test_blocks_are_both_of_their_sublayers():
    assert SublayerPlan.of(PLAN, phase="decode") == SublayerPlan([1, 2], [2], phase="decode")
    assert SublayerPlan.of(SkipPlan()).empty


@pytest.mark.parametrize(
    "plan",
    [
        SkipPlan([1], part="attn_identity"),
        SkipPlan([1], rows=[0]),
        SkipPlan([1], stop=0.5),
        SkipPlan([1], stack="layers"),
        SublayerPlan([1]),
    ],
)
def test_what_sublayers_cannot_say_is_refused(plan):
    with pytest.raises(SkipError, match="expected a"):
        SublayerPlan.of(plan)


def test_both_leave_out_the_same():
    model = BY_NAME["llama"].build()
    with Skipper(model, PLAN):
        expected = model.generate(**CALL)
    with SublayerPlan.of(PLAN).apply(model):
        assert torch.equal(model.generate(**CALL), expected)


def test_a_drafter_by_a_plan_of_the_core():
    model, spec = BY_NAME["llama"].build(), SelfSpeculative(plan=PLAN)
    assert spec == SelfSpeculative(plan=SublayerPlan.of(PLAN)) == SelfSpeculative.from_dict(spec.to_dict())
    assert torch.equal(spec.generate(model, **CALL), model.generate(**CALL))
    with pytest.raises(SkipError, match="leaves nothing out"):
        SelfSpeculative(plan=SkipPlan())


def test_a_little_too_slow_is_told_after_a_window_of_rounds_and_not_before():
    """Drafting of which little is accepted could reach 0.99 of the plain speed: no reason to stop until all is seen."""
    controller = Controller(patience=6, warmup=1)
    controller.plain_step(1.0)
    for count in range(1, 7):
        assert not controller.off, count
        controller.round([0.5], 0, 0.15, 1.1)
    assert controller.off and 0.85 < controller._best()[1] < 1


def test_drafting_is_tried_again_after_twice_as_long_each_time():
    controller, waited = Controller(retry=3, warmup=1), []
    controller.plain_step(1.0)
    for _ in range(4):
        while not controller.off:
            controller.round([0.9] * 4, 0, 2.4, 1.1)
        waited.append(0)
        while controller.next_length() == 0:
            controller.plain_step(1.0)
            waited[-1] += 1
    assert waited == [3, 6, 12, 24]
