"""Presets: found by a model's config, and what `layers=None` means in the API, the guider and the commands."""

import argparse
from pathlib import Path

import diffusers
import pytest
import torch

from skipguide import SkipError, find_blocks
from skipguide.cli import pipeline_calls
from skipguide.pipelines import SkipGroup, SkipGuider, find_preset, presets
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from skipguide.pipelines.presets import PRESETS, KnownModel, Preset
from skipguide.schedule import Schedule, Timetable
from zoo.pipes import BY_PIPE

# The released configs, as far as they differ from the defaults of the classes.
CONFIGS = {
    "LTX-Video 13B": {"num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096},
    "LTX-2.3": {"gated_attn": True},
    "CogVideoX 5B": {"num_layers": 42, "num_attention_heads": 48},
    "CogVideoX 1.5 5B": {"num_layers": 42, "num_attention_heads": 48, "patch_size_t": 2},
    "Wan 2.1 1.3B": {"num_layers": 30, "num_attention_heads": 12},
    "Wan 2.2 5B": {"num_layers": 30, "num_attention_heads": 24},
    "SD 3 medium": {"num_layers": 24, "num_attention_heads": 24, "pooled_projection_dim": 2048},
    "SD 3.5 medium": {"num_layers": 24, "num_attention_heads": 24, "dual_attention_layers": tuple(range(13))},
    "SD 3.5 large": {"num_layers": 38, "num_attention_heads": 38},
    "Kandinsky 5 Video Lite": {"model_dim": 1792, "ff_dim": 7168, "num_visual_blocks": 32, "num_text_blocks": 2},
    "Kandinsky 5 Video Pro": {"model_dim": 4096, "ff_dim": 16384, "num_visual_blocks": 60, "num_text_blocks": 4},
}


BUNDLED = Path(presets.__file__).resolve().parents[1] / "skipguide" / "assets" / "tiny-t2v" / "transformer"


class Pipe:
    """What tells Wan 2.2 from Wan 2.1."""

    def __init__(self, experts):
        self.transformer_2 = object() if experts else None


@pytest.mark.parametrize("known", PRESETS, ids=lambda each: each.name)
def test_a_published_model_is_told_by_its_config(known):
    cls = getattr(diffusers, known.model)
    with torch.device("meta"):
        bundled = known.name == "tiny-t2v"
        model = cls.from_config(cls.load_config(BUNDLED)) if bundled else cls(**CONFIGS.get(known.name, {}))
    pipe = Pipe(known.experts)
    if known.preset is None:
        with pytest.raises(SkipError, match=rf"no preset for {known.name} .* none known.*skipguide rank"):
            find_preset(model, pipe)
    else:
        assert find_preset(model, pipe) is known.preset
        assert set(known.preset.numbers) <= {block.index for block in find_blocks(model)}
        assert known.preset.source and known.preset.origin in ("authors", "community", "measured here")
    assert [each.name for each in PRESETS if each.matches(model, len(find_blocks(model)), bool(known.experts))] == [
        known.name
    ], "and by no other"


def test_every_model_that_people_ask_for_is_in_the_table():
    """With numbers and whose they are, or with none known."""
    asked = {
        "authors": ("LTX-Video 2B", "LTX-Video 13B", "LTX-2.0", "LTX-2.3", "Mochi", "SD 3.5 medium"),
        "community": ("Wan 2.1 1.3B", "Wan 2.1 14B"),
        "measured here": ("tiny-t2v",),
        None: (
            *("Wan 2.2 A14B", "Wan 2.2 5B", "HunyuanVideo 1.5", "CogVideoX 1.5 5B", "SD 3.5 large", "Flux", "Flux 2"),
            *("Qwen-Image", "Z-Image", "Kandinsky 5 Video Lite", "Kandinsky 5 Video Pro"),
        ),
    }
    found = {known.name: known.preset.origin if known.preset else None for known in PRESETS}
    assert {name: found[name] for names in asked.values() for name in names} == {
        name: origin for origin, names in asked.items() for name in names
    }


def test_a_model_of_the_same_class_and_depth_is_not_taken_for_it():
    model = diffusers.WanTransformer3DModel(num_layers=30, num_attention_heads=2, attention_head_dim=12, ffn_dim=8)
    with pytest.raises(SkipError, match="no preset for WanTransformer3DModel with 30 blocks and this config"):
        find_preset(model)


@pytest.fixture
def windowed(monkeypatch):
    """The tiny LTX has a preset with everything."""
    case = BY_PIPE["ltx"]
    pipe = case.build()
    config = pipe.transformer.config
    preset = Preset((1,), 2.5, "here", part="attn_identity", start=0.25, stop=0.75)
    width = config.num_attention_heads * config.attention_head_dim
    known = KnownModel("tiny", type(pipe.transformer).__name__, len(find_blocks(pipe.transformer)), width, preset)
    monkeypatch.setattr(presets, "PRESETS", (known,))
    return case, pipe, preset


WHOLE = {"layers": (1,), "scale": 2.5, "part": "attn_identity", "formula": "stg", "start": 0.25, "stop": 0.75}


def held(settings):
    return {name: getattr(settings, name) for name in WHOLE}


@pytest.mark.parametrize(
    ("given", "differs"),
    [
        ({}, {}),
        ({"scale": 1.0}, {"scale": 1.0}),
        ({"part": "block", "rescale": 0.5}, {"part": "block"}),
        ({"start": 0.5}, {"start": 0.5, "stop": 1.0}),  # a window is one thing
        ({"formula": "uncond"}, {"formula": "uncond", "scale": 1.0}),  # which has nothing for 2.5 to act on
        ({"layers": [1]}, {"scale": 1.0, "part": "block", "start": 0.0, "stop": 1.0}),
        ({"layers": [2], "part": "attn"}, {"layers": (2,), "scale": 1.0, "part": "attn", "start": 0.0, "stop": 1.0}),
    ],
)
def test_without_layers_the_whole_preset_holds_where_nothing_else_is_said(windowed, given, differs):
    case, pipe, _ = windowed
    stg = Stg(**given)
    found = stg.for_pipeline(pipe)
    assert held(found) == WHOLE | differs
    assert found.for_pipeline(pipe) == found and Stg.from_dict(found.to_dict()) == found
    assert Stg.from_dict(stg.to_dict()).for_pipeline(pipe) == found
    with stg.apply(pipe) as applied:
        assert applied.settings == found
    if given.get("formula") != "uncond":
        with found.apply(pipe):
            explicit = case.run(pipe, 4)
        with stg.apply(pipe):
            assert torch.equal(case.run(pipe, 4), explicit)


def test_explicit_values_keep_their_meaning(windowed):
    """Settings of version 1 were written with every value: layers of the preset, and what stands there."""
    old = Stg(layers=[0]).to_dict() | {"layers": None}
    assert held(Stg.from_dict(old).for_pipeline(windowed[1])) == WHOLE | {
        "scale": 1.0,
        "part": "block",
        "start": 0.0,
        "stop": 1.0,
    }


def test_scale_0_needs_no_preset_and_a_stack_no_guess(windowed):
    _, pipe, _ = windowed
    assert Stg(scale=0.0).for_pipeline(pipe) == Stg(scale=0.0)
    with pytest.raises(SkipError, match="name the layers too"):
        Stg(stack="transformer_blocks").for_pipeline(pipe)


def test_auto_is_what_calibration_took(windowed, monkeypatch):
    _, pipe, _ = windowed
    monkeypatch.setattr("skipguide.pipelines.stg.auto_layers", lambda *args: (2,))
    assert Stg("auto").for_pipeline(pipe) == Stg([2])
    assert Stg({"transformer": "auto"}).for_pipeline(pipe) == Stg({"transformer": [2]})
    assert Stg({"transformer": None}, scale=3.0).for_pipeline(pipe) == Stg({"transformer": [1]}, scale=3.0)
    assert Stg({"transformer": [0]}).for_pipeline(pipe) == Stg({"transformer": [0]})
    groups = [SkipGroup("auto"), SkipGroup(None, 0.5), SkipGroup([0])]
    assert Stg(groups=groups).for_pipeline(pipe) == Stg(groups=[SkipGroup([2]), SkipGroup([1], 0.5), SkipGroup([0])])


def test_the_guider_takes_the_same(windowed):
    _, pipe, _ = windowed
    modular = type("Modular", (), {"components": {"guider": None}, "transformer": pipe.transformer})()
    guider = SkipGuider().attach(modular)
    assert held(guider.settings) == WHOLE and modular.guider is guider
    assert guider.config.layers is None and guider.config.scale is None, "saved as what was asked for"
    lone = SkipGuider(guidance_scale=1.0)
    lone.set_state(0, 4, torch.tensor(1.0))
    batches = lone.prepare_inputs({})  # freed batches end the step
    assert len(batches) == 2
    with pytest.raises(SkipError, match=r"start=0.25, stop=0.75.*before the first step.*attach\(pipe\)"):
        lone.prepare_models(pipe.transformer)


def test_the_guider_alone_takes_layers_scale_and_part(windowed, monkeypatch):
    _, pipe, _ = windowed
    known = presets.PRESETS[0]
    plain = Preset((1,), 2.5, "here", part="attn_identity")
    monkeypatch.setattr(presets, "PRESETS", (KnownModel("tiny", known.model, known.blocks, known.width, plain),))
    guider = SkipGuider(guidance_scale=1.0)
    guider.set_state(0, 4, torch.tensor(1.0))
    batches = guider.prepare_inputs({})  # freed batches end the step
    guider.prepare_models(pipe.transformer)
    assert len(batches) == 2
    (skipped,) = guider._step_plan().skipped
    assert skipped.scale == 2.5 and [term.part for term in skipped.plan.terms] == ["attn_identity"]
    guider._end()


def test_the_commands_take_the_same_and_say_so(windowed, monkeypatch, capsys):
    _, pipe, _ = windowed
    monkeypatch.setattr("skipguide.pipelines.stg.auto_layers", lambda *args: (2,))

    def chosen(**flags):
        return pipeline_calls.guidance_arguments(argparse.Namespace(**flags), pipe)

    assert chosen() == WHOLE | {"layers": [1]}
    assert chosen(scale=1.0) == WHOLE | {"layers": [1], "scale": 1.0}
    assert capsys.readouterr().err == ""
    assert chosen(layers=[1]) == {"layers": [1], "scale": 2.5, "part": "attn_identity"}
    assert "layers of the model's preset, so its scale (2.5) and part (attn_identity) hold" in capsys.readouterr().err
    assert chosen(layers=[1], scale=1.0) == {"layers": [1], "scale": 1.0} and chosen(layers=[2]) == {"layers": [2]}
    assert capsys.readouterr().err == ""
    assert chosen(layers="auto") == {"layers": [2]} and "--layers auto took [2]" in capsys.readouterr().err


def test_tables_of_a_preset_are_read_by_the_noise_level():
    (known,) = (each for each in PRESETS if each.name == "LTX-Video 13B")
    layers, scale = known.preset.layers, known.preset.scale
    assert isinstance(layers, Timetable) and isinstance(scale, Timetable)
    assert [layers.at(0.0, sigma) for sigma in (1.0, 0.9933, 0.95, 0.618, 0.1)] == [(12,), (12,), (5,), (29,), (29,)]
    settings = Stg().filled(known.preset)
    assert settings.window == Schedule() and Stg.from_dict(settings.to_dict()) == settings
