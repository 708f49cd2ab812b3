"""Settings of self-speculative decoding: through a file and back, and refused where they mean nothing."""

import pytest
import torch
from helpers import drafting
from helpers.drafting import DRAFTS, LAYERS, SETS, prompt

from skipguide import SkipError
from skipguide.llm import AdaSkip, SelfSpeculative, SublayerPlan, SublayerStats
from skipguide.llm.cost import SublayerCosts

models, llama = drafting.models, drafting.llama


def test_json_round_trip(llama, tmp_path):
    stats = AdaSkip.calibrate(llama, [prompt(5), prompt(6)])
    spec = SelfSpeculative(stats=stats, costs=SublayerCosts((1.0,) * LAYERS, (2.0,) * LAYERS, 0.0, 64), max_draft=3)
    spec.save_json(tmp_path / "spec.json")
    assert SelfSpeculative.load_json(tmp_path / "spec.json") == spec
    DRAFTS.save_json(tmp_path / "drafts.json")
    assert SelfSpeculative.load_json(tmp_path / "drafts.json") == DRAFTS
    with spec.apply(llama) as applied:
        drafted = llama.generate(prompt(3), max_new_tokens=12, do_sample=False)
    assert torch.equal(drafted, llama.generate(prompt(3), max_new_tokens=12, do_sample=False))
    assert applied.stats.to_dict()["mlp"] == list(applied.stats.mlp)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"draft_skip": 0}, "draft_skip"),
        ({"draft_skip": 1.0}, "draft_skip"),
        ({"max_draft": 0}, "max_draft"),
        ({"draft_skip": "0.5"}, "draft_skip"),
        ({"plan": {"attn": [1]}}, "plan as a SublayerPlan"),
        ({"stats": {}}, "stats as a SublayerStats"),
        ({"plan": SublayerPlan()}, "leaves nothing out"),
        ({"plan": SETS["first"], "stats": SublayerStats((0.9,), (0.9,), (1.0,), (1.0,))}, "not both"),
    ],
)
def test_wrong_settings(wrong, expected):
    with pytest.raises(SkipError, match=expected):
        SelfSpeculative(**wrong)


def test_settings_for_another_model(llama):
    for wrong, expected in (
        ({"stats": SublayerStats((0.9,), (0.9,), (1.0,), (1.0,))}, "statistics are of a model of 1 layers"),
        ({"costs": SublayerCosts((1.0,), (1.0,), 0.0, 8)}, "costs are of a model of 1 layers"),
        ({"plan": SublayerPlan(attn=(99,))}, "layer 99 is out of range"),
        ({"plan": SublayerPlan(attn=range(LAYERS))}, "every attention"),
    ):
        with pytest.raises(SkipError, match=expected):
            SelfSpeculative(**wrong).apply(llama)
    with pytest.raises(SkipError, match="generate"):
        SelfSpeculative().apply(torch.nn.Linear(2, 2))
