"""SkipGuider: the same results as skip guidance on the classic pipeline, and as formulas written out here."""

import copy
import gc
import json
import pickle

import pytest
import torch
from helpers import guider_calls
from helpers.guider_calls import LAYER, by_guider, predictions, step
from helpers.residue import no_gates, traces
from helpers.stg_reference import close

from skipguide import SkipError, find_blocks
from skipguide.guidance import rescale
from skipguide.pipelines import SkipGroup, SkipGuider
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from skipguide.schedule import Timetable
from zoo import BY_NAME, modular
from zoo.pipes import BY_PIPE, STEPS

pytestmark = pytest.mark.numerics

wan = guider_calls.wan


def by_stg(pipe, stg, w, prompts=2, **call):
    case = BY_PIPE["wan"]
    with stg.apply(pipe) as applied:
        out = case.run(pipe, prompts, w != 1, guidance_scale=w, latents=modular.latents(prompts), **call)
    return out, applied.stats


SETTINGS = {
    "block": {},
    "late start": {"start": 0.3, "scale": 2.0},
    "early stop": {"stop": 0.5},
    "mlp": {"part": "mlp"},
    "attn_identity": {"part": "attn_identity"},
    "soft identity of a head": {"part": "attn_identity", "heads": [1], "strength": 0.5},
    "heads by layer": {"layers": [1, 2], "part": "attn_identity", "heads": {1: [0], 2: [1]}},
    "blur": {"part": "attn_blur", "part_options": {"sigma": 1.5}},
    "windows": {"part": "window_time"},
    "shuffle": {"part": "token_shuffle", "seed": 4},
    "swap": {"part": "self_swap", "part_options": {"ratio": 0.3}},
    "rescale": {"rescale": 0.7},
    "rescale over the batch": {"rescale": 0.7, "rescale_over": "batch"},
    "every second step": {"every": 2},
    "wan": {"formula": "wan", "scale": 0.5},
    "uncond": {"formula": "uncond"},
    "segmented": {"formula": "segmented"},
    "cfg interval": {"cfg_interval": (0.3, 1.0)},
    "projected": {"apg": 0.2, "apg_norm": 1.0},
    "cfg zero star": {"zero_star": True},
    "scale by timetable": {"scale": Timetable([(0.0, 0.0), (0.5, 2.0)])},
    "stochastic": {"layers": "stochastic", "seed": 3, "drop": 0.3},
    "groups": {"layers": None, "groups": (SkipGroup([1], 2.0), SkipGroup([1, 2], 0.5, "attn"))},
    "no prefix reuse": {"prefix_reuse": False},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_modular_pipeline_equals_guidance_on_the_classic_one(wan, settings):
    settings = {"layers": [LAYER]} | settings
    guider = SkipGuider(**settings, guidance_scale=5.0)
    expected, stats = by_stg(wan[1], Stg(**settings), 5.0)
    close(by_guider(wan[0], guider), expected)
    counted = ("passes", "blocks_run", "blocks_plain", "blocks_naive", "renewals")
    assert [getattr(guider.stats, name) for name in counted] == [getattr(stats, name) for name in counted]


@pytest.mark.parametrize("settings", [{"start": 0.9}, {"scale": Timetable([(0.0, 0.0), (0.9, 2.0)])}])
def test_a_run_in_which_no_step_is_guided_is_refused(wan, settings):
    with pytest.raises(SkipError, match=f"none of the {STEPS} steps"):
        by_guider(wan[0], SkipGuider([LAYER], **settings))
    no_gates(wan[0].transformer)


@pytest.mark.parametrize("settings", [{}, {"rescale": 0.7}, {"formula": "wan"}, {"every": 2}])
def test_without_cfg(wan, settings):
    """y = c + s (c - k): two passes, the second from the skipped layer on, and no negative prompt."""
    guider = SkipGuider([LAYER], scale=1.5, guidance_scale=1.0, **settings)
    assert guider.num_conditions == 1
    expected, _ = by_stg(wan[1], Stg([LAYER], scale=1.5, **settings), 1.0)
    close(by_guider(wan[0], guider), expected)
    computed = STEPS if settings.get("every") is None else 2
    n = len(find_blocks(wan[0].transformer))
    assert guider.stats.passes == STEPS + computed
    assert guider.stats.blocks_run == STEPS * n + computed * (n - 1 - LAYER)


def test_nothing_to_do_is_cfg_to_the_bit(wan):
    from diffusers import ClassifierFreeGuidance

    wan[0].update_components(guider=ClassifierFreeGuidance(guidance_scale=5.0))
    plain = modular.run(wan[0])
    for idle in ({"scale": 0.0}, {"layers": None, "scale": 0}):
        assert torch.equal(by_guider(wan[0], SkipGuider(**{"layers": [LAYER]} | idle), 1), plain), idle
    disabled = SkipGuider([LAYER])
    disabled.disable()
    wan[0].update_components(guider=ClassifierFreeGuidance(guidance_scale=1.0))
    assert torch.equal(by_guider(wan[0], disabled, 1), modular.run(wan[0]))
    original = SkipGuider([LAYER], guidance_scale=4.0, use_original_formulation=True)
    close(by_guider(wan[0], original, 1), by_guider(wan[0], SkipGuider([LAYER], guidance_scale=5.0), 1))


def test_guidance_rescale_acts_on_every_step_as_in_diffusers(wan):
    from diffusers import ClassifierFreeGuidance

    wan[0].update_components(guider=ClassifierFreeGuidance(guidance_scale=5.0, guidance_rescale=0.5))
    plain = modular.run(wan[0])
    close(by_guider(wan[0], SkipGuider([LAYER], scale=0.0, guidance_rescale=0.5), 1), plain)


def test_two_denoisers_with_a_guider_each():
    case = BY_PIPE["wan22"]
    guiders = [SkipGuider([LAYER], guidance_scale=5.0), SkipGuider([2], guidance_scale=3.0)]
    pipe = modular.build("wan22", guider=guiders[0], guider_2=guiders[1])
    classic = case.build()
    with Stg({"transformer": [LAYER], "transformer_2": [2]}).apply(classic):
        expected = case.run(classic, latents=modular.latents(1))
    close(modular.run(pipe), expected)
    assert all(guider.stats.passes for guider in guiders)
    for model in (pipe.transformer, pipe.transformer_2):
        no_gates(model)


@pytest.mark.parametrize("w", [6.0, 1.0])
def test_classic_pipeline_with_a_guider(w):
    case = BY_PIPE["hunyuan15" if w != 1 else "hunyuan15_no_cfg"]
    pipe = case.build()
    with Stg([LAYER], scale=1.5, rescale=0.3).apply(pipe) as applied:
        expected = case.run(pipe, 2)
    pipe.guider = guider = SkipGuider([LAYER], scale=1.5, rescale=0.3, guidance_scale=w)
    before = traces(pipe.transformer)
    close(case.run(pipe, 2), expected)
    assert traces(pipe.transformer) == before
    assert guider.stats.blocks_run == applied.stats.blocks_run
    with pytest.raises(SkipError, match="ClassifierFreeGuidance"):
        Stg([LAYER]).apply(pipe)


# -- the protocol by hand, against formulas written out ------------------------------------------------------------


FORMULAS = {
    "stg": lambda c, u, k, _, w, s: u + w * (c - u) + s * (c - k),
    "wan": lambda c, u, _, ku, w, s: (1 + s) * (u + w * (c - u)) - s * ku,
    "uncond": lambda c, u, _, ku, w, s: ku + w * (c - ku),
}


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("name", ["ltx", "hunyuan", "flux"])
def test_formulas_by_hand(name, formula):
    """In hunyuan and flux, layer 4 is a block of the second stack; flux returns the text first."""
    family = BY_NAME[name]
    model, inputs = family.build(), family.inputs(2)
    layer = min(4, len(family.block_names) - 1)
    s = 1.0 if formula == "uncond" else 1.5
    guider = SkipGuider([layer], scale=s, guidance_scale=3.0, formula=formula)
    before = traces(model)
    out, kinds = step(guider, model, inputs)
    assert traces(model) == before
    c, u, k, ku = predictions(family, model, layer, inputs)
    close(out.pred.double(), FORMULAS[formula](c, u, k, ku, 3.0, s))
    torch.testing.assert_close(out.pred_cond.double(), c)
    assert kinds == {"stg": [True, True, False], "wan": [True, False, False], "uncond": [True, False]}[formula]


def test_rescales_by_hand():
    family = BY_NAME["ltx"]
    model, inputs = family.build(), family.inputs(2)
    guider = SkipGuider([2], guidance_scale=3.0, rescale=0.7, guidance_rescale=0.4)
    c, u, k, _ = predictions(family, model, 2, inputs)
    y = rescale(rescale(u + 3 * (c - u) + (c - k), c, 0.7), c, 0.4)
    close(step(guider, model, inputs)[0].pred.double(), y)


def test_half_precision_is_combined_in_float32():
    c, u = (torch.randn(2, 64, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(2))
    guider = SkipGuider([1], guidance_scale=5.0)
    guider.set_state(0, 1, torch.tensor(1.0))
    assert guider.forward(c, u).pred.dtype == torch.bfloat16
    torch.testing.assert_close(guider.forward(c, u).pred, (u.float() + 5 * (c.float() - u.float())).bfloat16())


# -- the config ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_config_round_trip(settings, tmp_path):
    guider = SkipGuider(**{"layers": [LAYER]} | settings, guidance_scale=4.5, guidance_rescale=0.2)
    json.loads(guider.to_json_string())
    guider.save_pretrained(tmp_path)
    for again in (SkipGuider.from_pretrained(tmp_path), SkipGuider.from_config(guider.config), guider.new()):
        assert again.settings == guider.settings
        assert (again.guidance_scale, again.guidance_rescale) == (4.5, 0.2)
        assert {**again.config, "_name_or_path": ""} == {**guider.config, "_name_or_path": ""}
    assert guider.new(guidance_scale=3.0).guidance_scale == 3.0
    positional = SkipGuider([LAYER], 2.0)  # diffusers' own guiders lose positional arguments here
    assert positional.new().settings == positional.settings


def test_saved_and_loaded_with_a_classic_pipeline(tmp_path):
    import diffusers

    case = BY_PIPE["hunyuan15"]
    pipe = case.build()
    pipe.guider = SkipGuider([LAYER], scale=1.5, guidance_scale=6.0, start=0.3)
    expected = case.run(pipe)
    pipe.save_pretrained(tmp_path)
    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    again = diffusers.HunyuanVideo15Pipeline.from_pretrained(tmp_path, **absent)
    again.vision_num_semantic_tokens = pipe.vision_num_semantic_tokens
    again.set_progress_bar_config(disable=True)
    assert type(again.guider) is SkipGuider and again.guider.settings == pipe.guider.settings
    torch.testing.assert_close(case.run(again), expected)


def test_saved_and_loaded_with_a_modular_pipeline(tmp_path):
    from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec

    SkipGuider([LAYER], guidance_scale=4.0, start=0.3).save_pretrained(tmp_path / "own" / "guider")
    spec = ComponentSpec("guider", SkipGuider, pretrained_model_name_or_path=str(tmp_path / "own"), subfolder="guider")
    pipe = modular.build("wan", guider=spec.load())
    pipe.save_pretrained(str(tmp_path / "whole"), overwrite_modular_index=True)
    again = modular.BLOCKS["wan"]().init_pipeline(str(tmp_path / "whole"))
    again.load_components()
    again.set_progress_bar_config(disable=True)
    assert again.guider.settings == pipe.guider.settings and again.guider.guidance_scale == 4.0
    torch.testing.assert_close(modular.run(again), modular.run(pipe))


def test_copies_have_the_settings_and_start_anew(wan):
    guider = SkipGuider([LAYER], guidance_scale=5.0)
    expected = by_guider(wan[0], guider)
    for twin in (copy.deepcopy(guider), pickle.loads(pickle.dumps(guider))):
        assert twin.settings == guider.settings
        assert torch.equal(by_guider(wan[0], twin), expected)
    assert "SkipGuider" in repr(guider) and "num_conditions: 2" in repr(guider)


# -- no trace ------------------------------------------------------------------------------------------------------


def test_no_trace_after_an_exception_in_the_model(wan):
    pipe, guider = wan[0], SkipGuider([LAYER], guidance_scale=5.0)
    expected, before = by_guider(pipe, guider), traces(wan[0].transformer)
    block = pipe.transformer.blocks[3]
    for call in range(6):  # the last block runs in every pass: the first step's three, the second's three
        seen = []

        def fail(*_, seen=seen, call=call):
            seen.append(0)
            if len(seen) > call:
                raise KeyError("on purpose")

        handle = block.register_forward_pre_hook(fail)
        with pytest.raises(KeyError, match="on purpose"):
            modular.run(pipe, 2)
        handle.remove()
        assert traces(pipe.transformer) == before, "something is left, while the exception is still in flight"
        no_gates(pipe.transformer)
    assert torch.equal(by_guider(pipe, guider), expected)


def test_no_trace_after_an_exception_of_the_loop(wan, monkeypatch):
    """Between prepare_models and the model's call nothing of ours is on the stack: the batches' end is the sign."""
    pipe, guider = wan[0], SkipGuider([LAYER], guidance_scale=5.0)
    expected, before = by_guider(pipe, guider), traces(wan[0].transformer)
    prepare = SkipGuider.prepare_models

    def failing(self, denoiser):
        prepare(self, denoiser)
        if self._count_prepared == 2:
            raise KeyError("in the loop")

    with monkeypatch.context() as patch:
        patch.setattr(SkipGuider, "prepare_models", failing)
        try:
            modular.run(pipe, 2)
        except KeyError:
            pass
        else:
            raise AssertionError
        gc.collect()
        assert traces(pipe.transformer) == before
    assert torch.equal(by_guider(pipe, guider), expected)


def test_the_guider_lets_go_of_the_denoiser(wan):
    guider = SkipGuider([LAYER], every=2)
    by_guider(wan[0], guider)
    assert not guider._drivers and not guider._combinations


def test_the_model_is_untouched_on_steps_without_skips(wan):
    pipe, guider = wan[0], SkipGuider([LAYER], start=0.6)
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(lambda model, _: seen.append("forward" in vars(model)))
    try:
        by_guider(pipe, guider)
    finally:
        handle.remove()
    # cond, uncond on two steps; cond, skipped, uncond on the third, where the unconditional pass is without gates too
    assert seen == [False] * 4 + [True, True, False]
