"""The quality experiment: its measures against closed forms, its settings, its controls, and that it resumes."""

import json
import math

import pytest
import torch

from demos.quality import __main__ as command
from demos.quality.correlation import correlate, interval, spearman
from demos.quality.measures import diversity, flicker, frechet, motion, saturation
from demos.quality.sampling import Sampler, prompts
from demos.quality.settings import LAYER, LAYERS, QUICK, Setting, catalogue, single_layers
from demos.quality.summary import MEASURES, difference, frontier, summarise
from demos.quality.work import Plan, claimed, items
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from skipguide.select import LayerScore, LayerScores

# diffusers' DPM scheduler under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")


# -- measures -------------------------------------------------------------------------------------------------------


def test_frechet_of_gaussians_with_a_closed_form():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    assert frechet(a, a) == pytest.approx(0.0, abs=1e-9)
    assert frechet(a, a + 2.0) == pytest.approx(12.0)
    # covariances that commute: the sum of squared differences of deviations
    a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(a.T)).T)
    b = a * torch.tensor([1.0, 2.0, 3.0])
    assert frechet(a, b) == pytest.approx(0 + 1 + 4)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
    assert frechet(a @ turn, b @ turn) == pytest.approx(5.0)
    assert frechet(a[:2], b[:2]) >= -1e-9  # fewer samples than dimensions


def test_diversity_is_within_prompts_only():
    one, other = torch.zeros(2, 4), torch.full((2, 4), 100.0)
    assert diversity(torch.cat([one, other]), each=2) == 0.0
    apart = torch.tensor([[0.0], [2.0], [5.0], [6.0]])
    assert diversity(apart, each=2) == pytest.approx((2 + 1) / 2)


def test_movement_and_colour():
    steady = torch.arange(4.0)[None, :, None, None, None].expand(1, 4, 3, 2, 2)
    assert motion(steady).item() == 1.0 and flicker(steady).item() == 0.0
    blinking = torch.tensor([0.0, 1.0, 0.0, 1.0])[None, :, None, None, None].expand(1, 4, 3, 2, 2)
    assert motion(blinking).item() == 1.0 and flicker(blinking).item() == 2.0
    grey, red = torch.full((1, 2, 3, 2, 2), 0.5), torch.tensor([1.0, 0.0, 0.0])[None, None, :, None, None]
    assert saturation(grey).item() == 0.0 and saturation(red).item() == 1.0


def test_rank_correlation():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 400]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert spearman([1, 1, 2], [1, 1, 2]) == pytest.approx(1.0) and spearman([1, 1], [1, 2]) == 0.0
    low, high = interval(list(range(12)), [3, 1, 2, 5, 4, 6, 8, 7, 9, 11, 10, 0])
    assert -1 <= low < 0.5 < high <= 1


# -- settings -------------------------------------------------------------------------------------------------------


def test_settings_hold_what_the_issue_asks_for():
    every = catalogue()
    for setting in every.values():
        json.dumps(setting.to_dict())
        if setting.guidance is not None:
            Stg(**setting.guidance)
    families = {setting.family for setting in every.values()}
    assert families >= {
        "none", "cfg", "stg block", "stg attn_identity", "uncond", "cfg, more steps", "random direction",
        "autoguidance", "cfg_interval", "segmented", "stochastic", "every",
    }  # fmt: skip
    assert set(QUICK) <= set(every)
    assert set(single_layers()) == set(range(LAYERS)) and set(single_layers().values()) <= set(every)
    assert set(single_layers(4).values()) <= set(catalogue(layer=4))


def test_the_work_is_in_the_order_of_its_worth():
    every = list(catalogue().values())
    order = items(every, seeds=3)
    assert [item.setting.tier for item in order] == sorted(item.setting.tier for item in order)
    first = [item.seed for item in order if item.setting.tier == 1]
    assert first == sorted(first)
    assert {item.seed for item in order if item.setting.tier == 2} == {0}
    assert len({item.name for item in order}) == len(order)


def test_an_item_is_claimed_once(tmp_path):
    with claimed(tmp_path, "a") as mine, claimed(tmp_path, "a") as theirs, claimed(tmp_path, "b") as other:
        assert (mine, theirs, other) == (True, False, True)
    with claimed(tmp_path, "a") as again:
        assert again
    (tmp_path / "a.json").write_text("{}")
    with claimed(tmp_path, "a") as after:
        assert not after, "somebody finished it in between"


# -- verdicts -------------------------------------------------------------------------------------------------------


def row(name, values, cost=1.0, family="cfg", diverse=(1.0, 1.01, 0.99), control=""):
    spread = {"frechet": values, "diversity": list(diverse)}
    return {"name": name, "family": family, "cost": cost, "control": control, "seeds": [0, 1, 2]} | {
        key: {"mean": sum(v) / len(v), "sd": 0.1, "values": v} for key, v in spread.items()
    }


def test_verdicts_are_of_paired_differences():
    from demos.quality.summary import _judge

    rows = [
        row("cfg-3", [10.0, 12.0, 14.0]),
        row("cfg-6", [20.0, 21.0, 22.0]),
        row("good", [9.0, 11.1, 12.9], cost=0.8, family="x"),
        row("dear", [9.0, 11.1, 12.9], cost=1.1, family="x"),
        row("narrow", [9.0, 11.1, 12.9], cost=0.8, family="x", diverse=(0.5, 0.51, 0.49)),
        row("same", [9.0, 13.0, 14.0], cost=0.8, family="x"),
        row("control", [5.0, 7.1, 8.9], cost=0.8, family="x", control="weak"),
    ]
    _judge(rows)
    found = {r["name"]: (r["verdict"], bool(r.get("wins"))) for r in rows}
    assert found == {
        "cfg-3": ("reference", False), "cfg-6": ("worse", False), "good": ("better", True), "dear": ("better", False),
        "narrow": ("better", False), "same": ("tie", False), "control": ("better", False),
    }  # fmt: skip
    assert frontier(rows)[0] == "good" and "control" not in frontier(rows)
    mean, half = difference(rows[2], rows[0], "frechet")
    assert mean == pytest.approx(-1.0) and half == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)


def test_scores_are_judged_once_all_layers_are_there():
    gains = {n: float(n) for n in range(LAYERS)}
    rows = [row("cfg-3", [20.0])]
    assert correlate(rows, LAYER) == []
    rows += [row(name, [20.0 - gains[n]], family="single layers") for n, name in single_layers().items()]
    scores = LayerScores(
        tuple(LayerScore(n, f"b.{n}", "b", "block", 0.1 + n / 100, -0.1, 0.1, 0.1, 0.1, 0.1, 0.5, 1) for n in gains)
    )
    found = {c["score"]: c["rho"] for c in correlate(rows, LAYER, scores)}
    assert found["effect"] == pytest.approx(1.0) and found["aligned"] == 0.0


# -- the run --------------------------------------------------------------------------------------------------------


def test_clips_are_those_of_the_stock_pipeline_called_with_the_prompt():
    from demos.bundled_model.clips import caption

    sampler = Sampler(batch=2)
    specs = prompts(5, 1)
    made = sampler.make(Setting("cfg", "cfg", 1, w=3.0, precision="fp32"), specs, seed=0, steps=2)
    alone = sampler.pipe(
        caption(specs[3]), num_inference_steps=2, guidance_scale=3.0, output_type="pt",
        generator=torch.Generator().manual_seed(1_000_003), **sampler.call,
    ).frames[0]  # fmt: skip
    torch.testing.assert_close(made.pixels[3], alone, atol=1e-4, rtol=0)
    assert made.cost == 1.0
    held = [spec for spec in specs if spec is specs[4]]
    assert len(held) == 1 and prompts(5, 2)[8] == specs[4]


@pytest.mark.slow
def test_a_run_resumes_and_reports(tmp_path, capsys):
    words = ["--out", str(tmp_path), "--prompts", "5", "--each", "2", "--seeds", "1", "--steps", "2", "--workers", "0"]
    command.main([*words, "--only", "cfg-3", "random-1"])
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.seed0.*")}
    assert len(kept) == 4
    command.main([*words, "--only", "cfg-3", "random-1", "segmented-1", "autoguidance-1"])
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.seed0.*")}.items()
    text = (tmp_path / "results.md").read_text()
    assert "segmented-1" in text and "Not run (yet): autoguidance-1" in text and "one seed" in text
    assert text in capsys.readouterr().out
    for name in ("results.json", "results.csv", "quality_cost.png", "quality_diversity.png", "segmented-1.png"):
        assert (tmp_path / name).stat().st_size > 100
    settings = [catalogue()[name] for name in ("cfg-3", "segmented-1", "random-1")]
    result = summarise(tmp_path, settings, Plan(5, 2, 1, LAYER, 2))
    by_name = {found["name"]: found for found in result["rows"]}
    after = (LAYERS - 1 - LAYER) / LAYERS / 2  # the blocks behind the one that is skipped, which run once more
    wanted = [1.0, 0.75 + after / 2, 1 + after]
    assert [by_name[s.name]["cost"] for s in settings] == pytest.approx(wanted)
    assert all(math.isfinite(by_name["cfg-3"][name]["mean"]) for name in MEASURES if name != "still")
    assert result["floor"]["frechet"] < by_name["cfg-3"]["frechet"]["mean"]
    with pytest.raises(ValueError, match="cannot be mixed"):
        command.main([*words[:-4], "--only", "cfg-3"])
    with pytest.raises(SystemExit):
        command.main([*words, "--only", "luck"])
