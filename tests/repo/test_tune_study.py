"""The study of searched schedules: what is compared, the verdict's words, and one round at the smallest size."""

import json

import pytest

from demos.quality.settings import LAYERS
from demos.tune import report, settings, work
from demos.tune.settings import FRUGAL, SHARES, ways
from demos.tune.work import Plan, compute
from skipguide.pipelines import SpatiotemporalSkipGuidance, bundled_pipeline


def test_everything_that_is_asked_for_is_compared():
    found = ways()
    assert len({way.name for way in found}) == len(found)
    families = {way.family for way in found}
    for family in ("frugal, fewer steps", "plain CFG, fewer steps", "limited interval", "every", "cfg_every"):
        assert family in families
    assert {"FirstBlockCache", "MagCache", "TaylorSeer", "tuned from frugal", "tuned from stg"} <= families


def test_shares_are_those_of_frugal_with_fewer_steps():
    pipe, _ = bundled_pipeline()
    frugal = SpatiotemporalSkipGuidance(**FRUGAL)
    blocks = [frugal.cost(pipe, steps=steps).blocks_per_step * steps for steps in (12, 10, 8, 6)]
    whole = 2 * LAYERS * settings.STEPS
    assert [count / whole for count in blocks] == pytest.approx(SHARES, abs=0.03)


def row(name, low, high, **more):
    apart = {"difference": (low + high) / 2, "interval": [low, high], "against": "frugal-8"}
    return {"name": name, "start": "frugal", "family": "tuned", "cost": 0.6, "frechet": 40.0} | apart | more


def test_a_negative_result_is_printed_as_one():
    lost = "\n".join(report.verdict([row("a", 1.0, 3.0), row("b", -1.0, 1.0)]))
    assert "`a` is worse than `frugal-8`" in lost and "`b` cannot be told from" in lost and "A negative result" in lost
    won = "\n".join(report.verdict([row("a", -3.0, -1.0)]))
    assert "`a` beats `frugal-8`" in won and "negative" not in won


def test_what_cannot_be_run_says_why():
    way = {"name": "x", "not_offered": "ValueError: a | b"}
    assert report._row(way)[-1] == "ValueError: a \\| b"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_one_round_at_the_smallest_size(tmp_path):
    names = ("frugal-12", "tuned-frugal-0.61", "first-block")
    plan = Plan(prompts=4, real=2, calls=1, steps=3)
    result = compute(plan, [way for way in ways() if way.name in names], tmp_path)
    again = compute(plan, [way for way in ways() if way.name in names], tmp_path)
    assert json.loads(json.dumps(again)) == json.loads(json.dumps(result)), "finished cells are kept"
    found = {way["name"]: way for way in result["ways"]}
    assert found["tuned-frugal-0.61"]["cost"] <= 0.61 and found["frugal-12"]["frechet"] > 0
    assert "tuned-frugal-0.61" in report.text(result) and report.figure(result) is not None
    assert set(result["searched"]) == {"frugal"} and work.DRAWS > 0
