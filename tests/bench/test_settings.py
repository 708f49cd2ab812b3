"""What is compared: grids, controls, the choice of the baseline, and what is said in the end."""

import pytest

from skipguide.bench import settings as rows
from skipguide.bench.settings import Missing, Setting
from skipguide.bench.summary import Row, by_seed, choose_baseline, compare, conclusion


def test_grids_lie_around_the_models_own_scale():
    assert rows.scale_grid(4.0, rows.FACTORS) == (2.0, 3.0, 4.0, 6.0, 8.0)
    assert rows.scale_grid(1.5, rows.FACTORS) == (1.12, 1.5, 2.25, 3.0), "at 1 and below there is no CFG"
    assert rows.scale_grid(1.0, (1.0,)) == (1.0,)
    assert [row.name for row in rows.plain_grid([3.0, 4.5, None])] == ["cfg-3", "cfg-4.5", "plain"]
    assert rows.at_edge(2.0, (2.0, 3.0, 4.0))
    assert not rows.at_edge(3.0, (2.0, 3.0, 4.0))
    assert not rows.at_edge(3.0, (3.0,))


def test_the_controls_of_a_candidate():
    baseline = Setting("cfg-3", "", "cfg", w=3.0)
    candidate = Setting("preset", "", "guided", w=3.0, guidance={"layers": [9], "scale": 2.0}, cost=1.125)
    more = rows.more_steps(baseline, candidate, 12)
    assert (more.steps, more.w, more.guidance, more.kind) == (14, 3.0, None, "control")
    assert more.cost == pytest.approx(14 / 12), "what it really costs"
    random = rows.random_control(candidate)
    assert (random.guidance, random.direction, random.cost, random.w) == (candidate.guidance, "random", 1.125, 3.0)
    effective = rows.effective_cfg(candidate, 3.4567)
    assert (effective.w, effective.guidance) == (3.46, None)
    cheap = Setting("x", "", "guided", guidance={}, cost=0.92)
    assert isinstance(rows.more_steps(baseline, cheap, 12), Missing)


def test_the_cheapest_and_what_it_is_without_skipping():
    frugal, interval = rows.frugal(3.0, (2.0, 3.0, 4.0), {"layers": [9], "part": "block", "formula": "uncond"})
    assert frugal.w == interval.w == 4.0
    assert frugal.guidance["layers"] == [9]
    assert frugal.guidance["cfg_interval"] == interval.guidance["cfg_interval"] == [0.2, 0.8]
    assert "formula" not in frugal.guidance
    assert interval.guidance["scale"] == 0


def values(*of_seeds):
    return {"score": dict(enumerate(of_seeds))}


GRID = [Setting(f"cfg-{w}", "", "cfg", w=float(w)) for w in (2, 3, 4)]


@pytest.mark.parametrize(("better", "best"), [("lower", "cfg-3"), ("higher", "cfg-4")])
def test_the_baseline_is_the_best_plain_row(better, best):
    found = list(zip(GRID, (values(5, 5), values(1, 3), values(9, 3)), strict=True))
    assert choose_baseline(found, "score", better, 2.0).name == best


def test_without_a_score_that_decides_the_models_own_scale_is_the_baseline():
    found = [(row, values(1)) for row in GRID]
    assert choose_baseline(found, None, None, 3.9).name == "cfg-4"
    plain = rows.plain_grid([None])
    assert choose_baseline([(plain[0], values(1))], None, None, None).name == "plain"


def test_means_are_by_seed():
    clips = [(0, {"a": 1.0, "b": 2.0}), (0, {"a": 3.0}), (1, {"a": 7.0, "b": 0.0})]
    assert by_seed(clips) == {"a": {0: 2.0, 1: 7.0}, "b": {0: 2.0, 1: 0.0}}


def table(**of):
    kinds = {"base": "cfg", "own": "guided", "cheap": "reference"}
    made = [Row(Setting(name, "", kinds.get(name, "control")), values(*v), 1.0) for name, v in of.items()]
    return compare(made, "base")


def test_rows_are_compared_in_pairs():
    base, own = table(base=(1.0, 5.0, 9.0), own=(2.0, 6.0, 10.0))
    assert (base.means, base.against) == ({"score": 5.0}, {})
    assert (own.against["score"].mean, own.against["score"].half) == (1.0, 0.0)
    assert own.to_dict({"score": type("S", (), {"over": "seeds", "better": "higher"})})["scores"]["score"] == {
        "mean": 6.0,
        "values": {"0": 2.0, "1": 6.0, "2": 10.0},
        "over": "seeds",
        "difference": {"mean": 1.0, "half": 0.0, "count": 3},
        "verdict": "better",
    }


def test_help_is_claimed_only_against_every_control():
    base, own, far = (1.0, 2.0, 3.0), (3.0, 4.1, 5.0), (2.9, 4.2, 5.0)
    said = conclusion(table(base=base, own=own, random=(1, 2, 3.1)), "own", "base", "score", "higher")
    assert "beats the best plain CFG (base) and every control" in said
    said = conclusion(table(base=base, own=own, random=far), "own", "base", "score", "higher")
    assert "cannot be told from random" in said
    assert "It beats base." in said
    said = conclusion(table(base=base, own=own, random=far), "own", "base", "score", "lower")
    assert "loses to base" in said
    said = conclusion(table(base=base, own=own, cheap=(9, 9.5, 9.9)), "own", "base", "score", "higher")
    assert "it helps here" in said, "another way of guiding is no control of this one"
