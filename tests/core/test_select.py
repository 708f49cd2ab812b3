"""Scores of layers: the measures against their definitions, the ranking's laws, the run on real pipelines."""

import dataclasses
import json
import math

import pytest
import torch

from skipguide import SkipError, find_blocks
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from skipguide.pipelines import calibrate
from skipguide.pipelines.calibration import cache_file, cached_scores, chosen_steps, keep_scores, model_hash
from skipguide.select import SCORES, LayerScore, LayerScores, average, band_norms, measure_skip
from zoo.pipes import BY_PIPE, MODELS, understand_prompts


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SKIPGUIDE_CACHE", str(tmp_path / "cache"))


def row(layer, effect, alignment=0.0, cost=0.5, part="block", stack="blocks", **bands):
    known = dict.fromkeys(("space_low", "space_high", "time_low", "time_high"), 0.1) | bands
    return LayerScore(layer, f"{stack}.{layer}", stack, part, effect, alignment, cost=cost, samples=1, **known)


# -- measures -------------------------------------------------------------------------------------------------------


def test_measures_are_what_they_say():
    generator = torch.Generator().manual_seed(0)
    c, k, u = (torch.randn(3, 2, 4, 8, 8, generator=generator) for _ in range(3))
    found = measure_skip(c, k, u, grid=lambda x: x)
    for i in range(3):
        d, e = (c - k)[i].flatten(), (c - u)[i].flatten()
        assert found["effect"][i] == pytest.approx((d.norm() / c[i].norm()).item(), rel=1e-5)
        assert found["alignment"][i] == pytest.approx((d @ e / d.norm() / e.norm()).item(), abs=1e-5)
    assert set(measure_skip(c, k)) == {"effect"}


def test_bands_share_the_energy_between_them():
    video = torch.randn(2, 3, 5, 6, 10, generator=torch.Generator().manual_seed(0))
    bands = band_norms(video)
    whole = video.flatten(1).norm(dim=1)
    for axis in ("space", "time"):
        torch.testing.assert_close((bands[f"{axis}_low"] ** 2 + bands[f"{axis}_high"] ** 2).sqrt(), whole)
    assert set(band_norms(video[:, :, :1])) == {"space_low", "space_high"}


def test_bands_tell_fine_from_coarse():
    x = torch.arange(16.0)
    fine, coarse = torch.cos(math.pi * x), torch.cos(2 * math.pi * x / 16)
    for line, name in ((fine, "high"), (coarse, "low")):
        space = band_norms(line.expand(1, 1, 4, 16, 16))
        other = "low" if name == "high" else "high"
        assert space[f"space_{name}"] > 100 * space[f"space_{other}"]
        time = band_norms(line[:, None, None].expand(1, 1, 16, 4, 4))
        assert time[f"time_{name}"] > 100 * time[f"time_{other}"]


def test_averages_refuse_what_is_no_number():
    assert average([{"effect": torch.tensor([1.0, 3.0])}, {"effect": torch.tensor([2.0])}])["effect"] == 2.0
    with pytest.raises(SkipError, match="finite"):
        average([{"effect": torch.tensor([float("nan")])}])
    with pytest.raises(SkipError, match="finite"):
        average([])


# -- ranking --------------------------------------------------------------------------------------------------------


def test_the_deeper_of_two_equals_comes_first():
    scores = LayerScores((row(1, 0.30, cost=0.8), row(5, 0.29, cost=0.4), row(7, 0.1, cost=0.2)))
    assert [r.layer for r in scores.rank("effect")] == [5, 1, 7]
    assert scores.choose("effect") == (5,)
    assert scores.choose("effect", count=2) == (1, 5)


def test_skips_that_leave_no_model_come_last():
    scores = LayerScores((row(0, 3.0), row(1, 0.4), row(2, 0.2), row(3, 0.01)))
    assert [r.layer for r in scores.rank("effect")] == [2, 3, 1, 0]


def test_scores():
    one = row(3, 0.4, alignment=0.6, cost=0.5, space_low=0.1, space_high=0.3, time_low=0.2, time_high=0.1)
    expected = {"apart": 0.4, "effect": 0.4, "novelty": 0.32, "aligned": 0.6, "detail": 3.0}
    expected |= {"motion": 0.5, "thrift": 0.8}
    assert {name: score(one) for name, score in SCORES.items()} == pytest.approx(expected)
    bare = dataclasses.replace(one, alignment=None, space_low=None, time_low=None)
    assert SCORES["novelty"](bare) == 0.4 and SCORES["apart"](bare) == 1.0
    assert SCORES["apart"](dataclasses.replace(one, alignment=-0.6)) == pytest.approx(0.4)
    for name in ("aligned", "detail", "motion"):
        with pytest.raises(SkipError, match=name):
            SCORES[name](bare)


def test_scores_round_trip_and_print():
    scores = LayerScores((row(1, 0.3), row(2, 0.2, part="mlp")), "Model", 4, "abc", {"prompts": 2})
    assert LayerScores.from_dict(json.loads(json.dumps(scores.to_dict()))) == scores
    assert [r.part for r in scores.select("mlp")] == ["mlp"]
    table = scores.table()
    assert table.splitlines()[0].split()[:3] == ["rank", "layer", "part"] and len(table.splitlines()) == 3
    with pytest.raises(SkipError, match="unknown keys"):
        LayerScores.from_dict(scores.to_dict() | {"colour": 1})
    with pytest.raises(SkipError, match="unknown score"):
        scores.rank("luck")
    with pytest.raises(SkipError, match="3 layers"):
        scores.choose(count=3)


def test_levels_are_spread_over_the_steps():
    assert chosen_steps(8, 4) == (1, 3, 5, 7)
    assert chosen_steps(2, 4) == (0, 1)
    assert chosen_steps(1, 1) == (0,)


# -- the calibration run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ltx", "wan", "cogvideox", "hunyuan_true_cfg", "hunyuan15", "latte", "sd3", "flux"])
def test_calibration_on_a_pipeline(name):
    """Every layer and part is scored against a model without it, and nothing of the pipeline changes."""
    case = BY_PIPE[name]
    pipe = case.build()
    call = {k: v for k, v in case.call_kwargs(1).items() if k != "generator"} | {"num_inference_steps": 2}
    case.run(pipe, num_inference_steps=1)
    before = [(n, sorted(m.__dict__)) for n, m in pipe.transformer.named_modules()]
    blocks = find_blocks(pipe.transformer)
    scores = calibrate(pipe, [None], parts=["block", "attn"], levels=1, call=call, seed=5)
    assert [(n, sorted(m.__dict__)) for n, m in pipe.transformer.named_modules()] == before
    assert len(scores.select("block")) == len(blocks) == scores.blocks
    costs = [1 - (i + 1) / len(blocks) for i in range(len(blocks))]
    assert [r.cost for r in scores.select("block")] == pytest.approx(costs)
    with_cfg = case.cfg_modes[0] != "single"
    frames = name not in ("sd3", "flux")
    for r in scores.rows:
        assert (r.alignment is not None) == with_cfg and r.space_high is not None
        assert (r.time_high is not None) == frames
    # the second step of the run, by hand: the model without the layer on the same inputs
    seen = []
    handle = pipe.transformer.register_forward_hook(lambda m, a, k, out: seen.append((a, k, out[0])), with_kwargs=True)
    pipe(**call, generator=torch.Generator().manual_seed(5))
    handle.remove()
    args, kwargs, plain = seen[{"batched": 1, "two_calls": 2, "single": 1}[case.cfg_modes[0]]]
    weak = MODELS[case.family].identity_block(pipe.transformer, 2)
    with torch.no_grad():
        k = weak(*args, **kwargs)[0]
    half = len(plain) // 2 if case.cfg_modes[0] == "batched" else 0
    expected = measure_skip(plain[half:], k[half:])["effect"].item()
    assert scores.select("block")[2].effect == pytest.approx(expected, rel=1e-3)


def test_a_text_is_one_prompt_and_a_part_is_one_part():
    case, seen = BY_PIPE["wan"], []
    pipe = case.build()

    class Listening(type(pipe)):
        def __call__(self, prompt=None, **call):
            seen.append(prompt)
            return super().__call__(**call)

    pipe.__class__ = Listening
    call = {k: v for k, v in case.call_kwargs(1).items() if k != "generator"} | {"num_inference_steps": 1}
    scores = calibrate(pipe, "a tram", parts="attn_identity", levels=1, call=call)
    assert seen == ["a tram"] and {row.part for row in scores.rows} == {"attn_identity"}


def test_calibration_refuses():
    case = BY_PIPE["wan"]
    pipe = case.build()
    call = {k: v for k, v in case.call_kwargs(1).items() if k != "generator"}
    with pytest.raises(SkipError, match="any of the parts"):
        calibrate(pipe, [None], parts=["gate"], call=call)
    with Stg([1]).apply(pipe), pytest.raises(SkipError, match="guidance is applied"):
        calibrate(pipe, [None], call=call)
    with pytest.raises(SkipError, match="not described"):
        calibrate(object())
    for name in ("unet", "transformer_2", "vae"):
        with pytest.raises(SkipError, match=f"has no denoiser '{name}': expected transformer or transformer_2"):
            calibrate(pipe, [None], denoiser=name, call=call)
    with torch.no_grad():
        pipe.transformer.proj_out.weight.fill_(float("nan"))
    with pytest.raises(SkipError, match="finite"):
        calibrate(pipe, [None], parts=["block"], levels=1, call=call)


# -- layers="auto" ----------------------------------------------------------------------------------------------------


def test_auto_calibrates_once_per_weights(monkeypatch):
    from skipguide.pipelines import calibration as module

    case = BY_PIPE["wan"]
    pipe = case.build()
    understand_prompts(pipe)
    runs = []
    original = module.calibrate

    def small(pipe, **how):
        runs.append(how)
        call = {"height": 48, "width": 48, "num_frames": 5, "num_inference_steps": 2}
        return original(pipe, ["a cat"], levels=1, call=call, **how)

    monkeypatch.setattr("skipguide.pipelines.calibration.calibrate", small)
    with Stg("auto").apply(pipe) as applied:
        chosen = applied.layers["transformer"]
        case.run(pipe)
    assert chosen == cached_scores(pipe.transformer).choose("novelty", "block")
    for _ in range(2):
        with Stg("auto", score="effect").apply(pipe):
            pass
    assert len(runs) == 1
    with torch.no_grad():
        pipe.transformer.proj_out.weight.add_(1.0)
    assert cached_scores(pipe.transformer) is None
    with Stg("auto", part="attn").apply(pipe):
        pass
    assert [run["parts"] for run in runs] == [["block"], ["attn"]]


def test_auto_counts_within_a_stack():
    pipe = BY_PIPE["latte"].build()
    rows = tuple(
        row(b.index, 0.3 - 0.01 * b.index, stack=b.stack, cost=1 - b.index / 10) for b in find_blocks(pipe.transformer)
    )
    keep_scores(pipe.transformer, LayerScores(rows))
    stack = "temporal_transformer_blocks"
    with Stg("auto", stack=stack).apply(pipe) as applied:
        assert applied.layers["transformer"] == cached_scores(pipe.transformer).choose(stack=stack)


def test_cached_scores_of_other_parts_stay(caplog):
    model = BY_PIPE["wan"].build().transformer
    keep_scores(model, LayerScores((row(1, 0.3), row(2, 0.2))))
    keep_scores(model, LayerScores((row(1, 0.4), row(1, 0.1, part="attn"))))
    found = {(r.layer, r.part): r.effect for r in cached_scores(model).rows}
    assert found == {(1, "block"): 0.4, (1, "attn"): 0.1, (2, "block"): 0.2}
    cache_file(model).write_text("{")
    assert cached_scores(model) is None and "made anew" in caplog.text


def test_auto_says_what_to_do_when_it_cannot_run():
    pipe = BY_PIPE["wan"].build()
    with pytest.raises(SkipError, match="skipguide rank"):
        Stg("auto").apply(pipe)


def test_the_hash_changes_with_the_weights():
    model, other = BY_PIPE["wan"].build().transformer, BY_PIPE["wan"].build(1).transformer
    assert model_hash(model) == model_hash(BY_PIPE["wan"].build().transformer) != model_hash(other)


def test_rank_command_on_the_bundled_model(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    from skipguide.cli import main

    monkeypatch.chdir(tmp_path)
    words = ["rank", "--steps", "1", "--levels", "1", "--prompts", "a red circle moving right", "--parts", "block"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "WanTransformer3DModel: 8 blocks" in printed and "blocks.5" in printed
    assert {p.name for p in tmp_path.glob("tiny*")} == {
        "tiny-t2v-rank.png", "tiny-t2v-rank.csv", "tiny-t2v-rank.png.json",
    }  # fmt: skip
    assert main(words) == 2 and "exists already" in capsys.readouterr().err
