"""A plan of the core is a plan of sublayers too: for a drafter, and in the phases of a language model."""

import pytest
import torch
from helpers.llm_zoo import BY_NAME, prompt

from skipguide import Skipper, SkipPlan
from skipguide.errors import SkipError
from skipguide.llm import SelfSpeculative, SublayerPlan

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
