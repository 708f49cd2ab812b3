"""Settings of skip guidance: through a file and back, numbers of any library, and refused where they mean nothing."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from helpers.stg_reference import named

from skipguide import NoEffectError, SkipError, SkipPlan, Timetable
from skipguide.pipelines import SkipGroup, SkipGuider, SpatiotemporalSkipGuidance
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from skipguide.schedule import Schedule
from zoo.pipes import BY_PIPE, MODELS

# Settings of skip guidance: through a file and back, and refused where they mean nothing.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers": []}, "empty"),
        ({"layers": [1.5]}, "whole numbers"),
        ({"layers": [1, 1]}, "twice"),
        ({"layers": [1], "scale": float("nan")}, "finite"),
        ({"layers": [1], "scale": float("inf")}, "finite"),
        ({"layers": [1], "scale": "2"}, "finite"),
        ({"layers": [1], "part": "ffn"}, "unknown part"),
        ({"layers": [1], "formula": "paper"}, "unknown formula"),
        ({"layers": [1], "rescale": 1.5}, "rescale"),
        ({"layers": [1], "rescale_over": "frames"}, "rescale_over"),
        ({"layers": [1], "start": 0.5, "stop": 0.5}, "start"),
        ({"layers": [1], "start": -0.1}, "start"),
        ({"layers": [1], "every": 0}, "every"),
        ({"layers": [1], "formula": "uncond", "scale": 2.0}, "no third pass"),
        ({"layers": torch.tensor([1.5])}, "whole numbers"),
        ({"layers": torch.tensor([False, True])}, "whole numbers"),
        ({"layers": float("nan")}, "whole numbers|one or several"),
        ({"layers": {"transformer": []}}, "empty"),
        ({"layers": [1], "start": "0"}, "start"),
        ({"layers": [1], "stop": "1"}, "start"),
        ({"layers": [1], "cfg_interval": 0.5}, "pair"),
        ({"layers": [1], "cfg_interval": ("a", "b")}, "fractions"),
        ({"groups": SkipGroup([1])}, "list of SkipGroup"),
        ({"groups": [1]}, "mapping"),
        ({"layers": "stochastic", "seed": torch.Generator()}, "seed"),
    ],
)
def test_settings_that_mean_nothing(settings, words):
    with pytest.raises(SkipError, match=words):
        Stg(**settings)


def test_numbers_of_other_libraries_are_saved_as_pythons(tmp_path):
    table = Timetable([(0, np.array([1, 2])), (np.float32(0.5), torch.tensor([3]))])
    for layers in (np.int64(2), torch.tensor([1, 2]), table, {"transformer": table, "transformer_2": "stochastic"}):
        stg = Stg(layers, start=np.float32(0.25), cfg_interval=np.array([0.0, 0.5]), seed=np.int64(3))
        stg.save_json(tmp_path / "stg.json", overwrite=True)
        assert Stg.load_json(tmp_path / "stg.json") == stg


def test_a_file_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "stg.json").write_text("{")
    for kind in (Stg, SkipPlan):
        with pytest.raises(SkipError, match=r"expected JSON in .*stg.json"):
            kind.load_json(tmp_path / "stg.json")


def test_settings_round_trip(tmp_path):
    stg = Stg({"transformer": [1, 2]}, scale=2, part="attn", rescale=0.5, every=2, stop=0.8)
    stg.save_json(tmp_path / "stg.json")
    assert Stg.load_json(tmp_path / "stg.json") == stg
    with pytest.raises(SkipError, match="exists"):
        stg.save_json(tmp_path / "stg.json")
    data = json.loads((tmp_path / "stg.json").read_text())
    with pytest.raises(SkipError, match="colour"):
        Stg.from_dict(data | {"colour": "red"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        stg.scale = 3


# Numbers and flags in the settings of guidance: of any library, kept as Python's own; anything else is refused.

NUMBERS = {
    "scale": 1,
    "rescale": 1,
    "apg": 0,
    "apg_norm": 2,
    "drop": 0.25,
    "seed": 3,
    "every": 2,
    "start": 0,
    "stop": 1,
}
WHOLE = ("seed", "every")
FLAGS = ("prefix_reuse", "zero_star", "prefer_cheap")


def forms(name: str) -> list[Any]:
    """A setting's number as other libraries hold it."""
    value = NUMBERS[name]
    kinds = [np.float32, np.float64, torch.tensor, np.array]
    if name in WHOLE:
        kinds = [np.int64, np.int32, torch.tensor, np.array]
    return [kind(value) for kind in kinds]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in NUMBERS for value in forms(name)])
def test_a_number_of_another_library_is_the_same_setting(name: str, value: Any):
    made = SpatiotemporalSkipGuidance(layers=[1], **{name: value})
    assert made == SpatiotemporalSkipGuidance(layers=[1], **{name: NUMBERS[name]})
    assert type(getattr(made, name)) in (int, float)
    assert SpatiotemporalSkipGuidance.from_dict(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [True, "1", [1], float("nan"), np.array([1.0]), np.bool_(True)])
def test_what_is_not_a_number_is_refused(name: str, value: Any):
    with pytest.raises(SkipError, match=name if name != "stop" else "start and stop"):
        SpatiotemporalSkipGuidance(layers=[1], **{name: value})


@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_true_or_false(name: str):
    made = SpatiotemporalSkipGuidance(layers=[1], **{name: np.bool_(True)})
    assert getattr(made, name) is True
    for value in ("no", 1, None):
        with pytest.raises(SkipError, match=f"expected {name} as True or False"):
            SpatiotemporalSkipGuidance(layers=[1], **{name: value})


def test_groups_and_timetables_take_numbers_of_other_libraries():
    assert SkipGroup([1], scale=np.float32(0.5)).scale == 0.5
    table = Timetable([(np.float32(0.5), np.int64(2)), (0, torch.tensor(1.0))])
    assert table == Timetable([(0.0, 1.0), (0.5, 2)])
    assert Timetable([(0.0, np.array([1, 2]))]).values == ((1, 2),)
    json.dumps(table.to_dict())
    for places in ([("0.5", 1)], [(True, 1)], [(None, 1)]):
        with pytest.raises(SkipError, match="finite places"):
            Timetable(places)


def test_a_guider_takes_them_too_and_its_config_is_plain():
    guider = SkipGuider([1], scale=np.float32(0.5), guidance_scale=np.float32(4.0), guidance_rescale=torch.tensor(0.5))
    assert json.loads(guider.to_json_string())["guidance_scale"] == 4.0
    again = SkipGuider.from_config(guider.config)
    assert (again.settings, again.guidance_scale, again.guidance_rescale) == (guider.settings, 4.0, 0.5)
    with pytest.raises(SkipError, match="enabled as True or False"):
        SkipGuider([1], enabled="no")


def test_a_fraction_in_single_precision_is_the_same_window():
    assert float(np.float32(0.1)) > 0.1  # so that the last bits would leave step 1 of 10 out
    for start in (0.1, 0.2, 0.3, 0.6, 0.7):
        single = Schedule(np.float32(start), every=2)
        for steps in (10, 30, 50, 1000):
            same = Schedule(start, every=2)
            assert [single.fresh(i, steps) for i in range(steps)] == [same.fresh(i, steps) for i in range(steps)]
        until = Schedule(0.0, np.float32(start))
        assert [i for i in range(10) if until.active(i, 10)] == list(range(round(start * 10)))


@pytest.mark.parametrize("layers", [b"12", {}, {1: [2]}, 1.0, np.float32(1)])
def test_layers_that_name_nothing_are_refused(layers: Any):
    with pytest.raises(SkipError, match=r"block numbers|names denoisers"):
        SpatiotemporalSkipGuidance(layers=layers)


def test_words_that_are_none_are_refused():
    with pytest.raises(SkipError, match="stack is the name"):
        SpatiotemporalSkipGuidance(layers=[1], stack=["blocks"])
    with pytest.raises(SkipError, match="stack is the name"):
        SkipGroup([1], stack=3)
    with pytest.raises(SkipError, match="finite number"):
        SkipGroup([1], scale=10**400)
    with pytest.raises(SkipError, match="unknown score"):
        SpatiotemporalSkipGuidance(layers=[1], score=[])
    with pytest.raises(SkipError, match="got start='0'"):
        SkipPlan([1], start="0")


# Skip guidance that cannot be: refused when applied or during the run, never a silent nothing.


def test_refused_at_apply():
    pipe = BY_PIPE["ltx"].build()
    before = [(name, sorted(m.__dict__)) for name, m in pipe.transformer.named_modules()]
    with pytest.raises(SkipError, match="out of range"):
        Stg([7]).apply(pipe)
    with pytest.raises(SkipError, match="sweep"):
        Stg().apply(pipe)
    with pytest.raises(SkipError, match="cross_attn"):
        Stg([1], part="cross_attn").apply(BY_PIPE["mochi"].build())
    with pytest.raises(SkipError, match="not described"):
        Stg([1]).apply(object())
    with pytest.raises(SkipError, match=r"names transfromer_2, but the denoisers of LTXPipeline are transformer"):
        Stg({"transformer": [1], "transfromer_2": [1]}).apply(pipe)
    empty = BY_PIPE["ltx"].build()
    empty.transformer = None
    with pytest.raises(SkipError, match="no denoiser"):
        Stg([1]).apply(empty)
    with Stg([1]).apply(pipe), pytest.raises(SkipError, match="already applied"):
        Stg([2]).apply(pipe)
    assert [(name, sorted(m.__dict__)) for name, m in pipe.transformer.named_modules()] == before


def test_other_guiders_are_refused():
    import diffusers

    pipe = BY_PIPE["hunyuan15"].build()
    pipe.guider = diffusers.AdaptiveProjectedGuidance()
    with pytest.raises(SkipError, match="AdaptiveProjectedGuidance"):
        Stg([1]).apply(pipe)


@named([BY_PIPE[n] for n in ("ltx", "wan", "hunyuan")])
@pytest.mark.parametrize(
    "settings",
    [
        {"start": 0.4, "stop": 0.6},
        {"scale": Timetable([(0.0, 0.0), (0.9, 2.0)])},
        {"formula": "segmented", "cfg_interval": (0.0, 0.9)},
        {"formula": "uncond", "start": 0.5, "cfg_interval": (0.0, 0.5)},
    ],
)
def test_a_run_in_which_no_step_is_guided_is_refused(case, settings):
    pipe = case.build()
    with pytest.raises(SkipError, match="none of the 3 steps"), Stg([1], **settings).apply(pipe):
        case.run(pipe)


def test_a_skip_without_effect_raises():
    case = BY_PIPE["ltx"]
    pipe = case.build()
    pipe.transformer = MODELS["ltx"].identity_block(pipe.transformer, 3)
    with pytest.raises(NoEffectError, match="did not change"), Stg([3]).apply(pipe):
        case.run(pipe)


def test_nan_in_the_weights_is_not_silent():
    case = BY_PIPE["ltx"]
    pipe = case.build()
    with torch.no_grad():
        pipe.transformer.proj_out.weight.fill_(float("nan"))
    with pytest.raises(SkipError, match="not finite"), Stg([1]).apply(pipe):
        case.run(pipe)


@named([BY_PIPE[n] for n in ("ltx", "wan")])
def test_a_denoiser_that_is_called_outside_of_the_pipeline_is_noticed(case):
    pipe, family = case.build(), MODELS[case.family]
    with Stg([1]).apply(pipe):
        case.run(pipe)
        with pytest.raises(SkipError, match="not a pipeline"):
            family.run(pipe.transformer, family.inputs(2))


@named([BY_PIPE[n] for n in ("ltx", "wan", "hunyuan")])
def test_uncond_formula_needs_cfg(case):
    pipe = case.build()
    with pytest.raises(SkipError, match="CFG"), Stg([1], formula="uncond").apply(pipe):
        case.run(pipe, cfg=False)


@pytest.mark.parametrize("window", [{}, {"stop": 0.1}])
def test_solve_needs_a_scale_that_stays(window):
    """Said at the first step, where w is not changed yet, even if that is the only one with guidance."""
    dynamic = BY_PIPE["cogvideox_dynamic"]
    pipe = dynamic.build()
    with pytest.raises(SkipError, match="use_dynamic_cfg"), Stg([1], rescale=0.7, **window).apply(pipe):
        dynamic.run(pipe)
