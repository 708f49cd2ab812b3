"""PrefixReuse on modular pipelines: the further passes that diffusers' guiders ask for."""

import copy
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import LayerSkipConfig, LTX2Guidance, SkipLayerGuidance
from diffusers.hooks import HookRegistry
from diffusers.hooks.layer_skip import _apply_layer_skip_hook
from diffusers.hooks.smoothed_energy_guidance_utils import (
    SmoothedEnergyGuidanceConfig,
    _apply_smoothed_energy_guidance_hook,
)
from helpers.residue import no_gates, traces

from skipguide import SkipError, applied_to, remove_from
from skipguide.pipelines import PrefixReuse
from zoo import BY_NAME, modular
from zoo.pipes import STEPS

ALWAYS = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}  # diffusers leaves out the first step
BLOCKS = 4  # of the zoo's Wan


def skips(layers, scale=5.0, fqn="blocks", **own):
    config = LayerSkipConfig(list(layers), fqn=fqn)
    return SkipLayerGuidance(guidance_scale=scale, skip_layer_config=config, **{**ALWAYS, **own})


def both(pipe, run=modular.run, **call):
    plain = run(pipe, **call)
    with PrefixReuse().apply(pipe) as applied:
        out = run(pipe, **call)
    return plain, out, applied.stats


# -- guiders with hooks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [1, 2])
@pytest.mark.parametrize("layers", [[1], [2], [1, 2]], ids=str)
@pytest.mark.parametrize("fqn", ["blocks", "auto"])
def test_skip_layer_guidance(prompts, layers, fqn):
    pipe = modular.build("wan", guider=skips(layers, fqn=fqn))
    plain, out, stats = both(pipe, num_prompts=prompts)
    assert torch.equal(out, plain)
    assert stats.reused == {"hooked layers": STEPS - 1} and not stats.not_reused
    assert stats.blocks_plain == prompts * (STEPS * 2 * BLOCKS + (STEPS - 1) * (BLOCKS - len(layers)))
    assert stats.blocks_plain - stats.blocks_run == prompts * (STEPS - 1) * layers[0]
    no_gates(pipe.transformer)


def test_two_denoisers_have_a_guider_each():
    guiders = {"guider": skips([2]), "guider_2": skips([1], 4.0)}
    pipe = modular.build("wan22", **guiders)
    plain, out, stats = both(pipe)
    assert torch.equal(out, plain)
    assert sum(stats.reused.values()) == STEPS - 1 and not stats.not_reused


@pytest.mark.parametrize(
    ("layers", "why"),
    [([0], "it differs from the first block on"), ([3], "no block runs behind those that are left out")],
)
def test_what_cannot_be_taken_up_runs_whole(layers, why):
    pipe = modular.build("wan", guider=skips(layers))
    plain, out, stats = both(pipe)
    assert torch.equal(out, plain)
    assert stats.not_reused == {f"hooked layers whole: {why}": STEPS - 1}


def test_outside_its_window_nothing_is_kept():
    pipe = modular.build("wan", guider=skips([1], skip_layer_guidance_stop=0.5))
    plain, out, stats = both(pipe)
    assert torch.equal(out, plain)
    assert not stats.reused and stats.blocks_run == stats.blocks_plain == STEPS * 2 * BLOCKS


PARTS = {
    "attention": {"skip_attention": True, "skip_ff": False},
    "scores": {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False},
    "feed-forward": {"skip_attention": False, "skip_ff": True},
}


def hook(model, what, layers):
    if what == "energy":
        config = SmoothedEnergyGuidanceConfig(layers, fqn="transformer_blocks")
        _apply_smoothed_energy_guidance_hook(model, config, 1.0, name="weak")
    else:
        _apply_layer_skip_hook(model, LayerSkipConfig(layers, fqn="transformer_blocks", **PARTS[what]), name="weak")


@torch.no_grad()
@pytest.mark.parametrize("what", [*PARTS, "energy"])
def test_hooks_inside_of_blocks(what):
    """A loop of one's own that puts the hooks on as the guiders do."""
    family = BY_NAME["pixart"]
    model, inputs = family.build(), {**family.inputs(2), "return_dict": False}

    def steps():
        outs = []
        for _ in range(2):
            c = model(**inputs)[0]
            hook(model, what, [2, 3])
            outs.append(model(**inputs)[0])
            HookRegistry.check_if_exists_or_initialize(model).remove_hook("weak", recurse=True)
            assert not torch.equal(c, outs[-1])
        return outs

    expected = steps()
    with PrefixReuse().apply(SimpleNamespace(transformer=model)) as applied:
        found = steps()
    assert all(map(torch.equal, found, expected))
    # nobody foretells these hooks, so their place is known from the second step on
    assert applied.stats.reused == {"hooked layers": 1} and sum(applied.stats.not_reused.values()) == 1
    assert applied.stats.blocks_plain - applied.stats.blocks_run == 2 * 2


@torch.no_grad()
def test_a_weak_pass_with_other_inputs_is_not_kept_for_forever():
    """As AutoGuidance calls it: the hooks are on in the unconditional pass."""
    family = BY_NAME["pixart"]
    model = family.build()
    c, u = ({**family.inputs(1, seed), "return_dict": False} for seed in (0, 1))
    with PrefixReuse().apply(SimpleNamespace(transformer=model)) as applied:
        for _ in range(9):
            model(**c)
            hook(model, "attention", [2])
            out = model(**u)[0]
            HookRegistry.check_if_exists_or_initialize(model).remove_hook("weak", recurse=True)
        (state,) = applied._parts[0]._threads.values()
        assert not state.learned and not state.calls
    hook(model, "attention", [2])
    assert torch.equal(out, model(**u)[0])
    assert not applied.stats.reused


@torch.no_grad()
def test_hooks_that_were_there_before_leave_nothing_to_compare_with():
    family = BY_NAME["pixart"]
    model, inputs = family.build(), {**family.inputs(2), "return_dict": False}
    hook(model, "attention", [2])
    expected = model(**inputs)[0]
    with PrefixReuse().apply(SimpleNamespace(transformer=model)) as applied:
        assert all(torch.equal(model(**inputs)[0], expected) for _ in range(2))
    assert not applied.stats.reused


# -- LTX-2 ------------------------------------------------------------------------------------------------------------


def ltx2_guiders(**own):
    scales = {"guidance_scale": 3.0, "stg_scale": 1.0, "modality_scale": 3.0, "guidance_rescale": 0.7, **own}
    video = LTX2Guidance(**scales, spatio_temporal_guidance_blocks=[2])
    return {"guider": video, "audio_guider": LTX2Guidance(**scales)}


@pytest.mark.parametrize("clips", [1, 2])
def test_modular_ltx2_is_bit_equal(clips):
    pipe = modular.build_ltx2(**ltx2_guiders())
    plain, out, stats = both(pipe, modular.run_ltx2, clips=clips)
    assert torch.equal(out, plain)
    assert stats.passes == 4 * STEPS and stats.sublayers_reused == 4 * STEPS
    assert stats.blocks_run == STEPS * clips * (4 * 3 - 2)
    assert stats.reused == {"STG": STEPS, "modality isolation": STEPS} and not stats.not_reused


def test_modular_ltx2_in_a_window():
    pipe = modular.build_ltx2(**ltx2_guiders(start=0.4))
    plain, out, stats = both(pipe, modular.run_ltx2)
    assert torch.equal(out, plain)
    assert stats.reused == {"STG": 2, "modality isolation": 2} and not stats.not_reused


def test_modular_ltx2_with_cfg_alone():
    guiders = {name: diffusers.ClassifierFreeGuidance(guidance_scale=3.0) for name in ("guider", "audio_guider")}
    for guider in guiders.values():  # what the denoiser block reads of its guider
        guider.spatio_temporal_guidance_blocks = None
        guider.active_predictions = lambda: ["pred_cond", "pred_uncond"]
    pipe = modular.build_ltx2(**guiders)
    plain, out, stats = both(pipe, modular.run_ltx2)
    assert torch.equal(out, plain) and not stats.reused and not stats.not_reused


def test_nothing_is_left_on_a_modular_pipeline():
    pipe = modular.build_ltx2(**ltx2_guiders())
    before = traces(pipe.transformer)
    applied = PrefixReuse().apply(pipe)
    modular.run_ltx2(pipe)
    assert not any(state.calls for state in applied._parts[0]._threads.values())
    assert applied_to(pipe) == [applied] == remove_from(pipe)
    assert traces(pipe.transformer) == before


# -- guiders of diffusers that do not do what they say ----------------------------------------------------------------


def refused(model, guider, match):
    with pytest.raises(SkipError, match=match) as told:
        PrefixReuse().apply(SimpleNamespace(transformer=model, guider=guider))
    assert "SkipGuider" in str(told.value)
    no_gates(model)


def test_layers_as_whole_numbers():
    guider = SkipLayerGuidance(skip_layer_guidance_layers=[2])
    with pytest.raises(TypeError):
        _apply_layer_skip_hook(BY_NAME["wan"].build(), copy.copy(guider.skip_layer_config[0]), name="weak")
    refused(BY_NAME["wan"].build(), guider, "SkipLayerGuidance of this diffusers fails on layers .* whole numbers")


def test_perturbed_attention_on_wan():
    guider = diffusers.PerturbedAttentionGuidance(perturbed_guidance_layers=[2])
    refused(BY_NAME["wan"].build(), guider, "PerturbedAttentionGuidance .* fails on WanTransformer3DModel")


def test_smoothed_energy_never_acts():
    guider = diffusers.SmoothedEnergyGuidance(seg_guidance_config=SmoothedEnergyGuidanceConfig([2], fqn="blocks"))
    refused(BY_NAME["wan"].build(), guider, "never puts its hooks on")


def test_streams_that_the_hook_exchanges():
    refused(BY_NAME["sd3"].build(), skips([2], fqn="transformer_blocks"), "exchanges the streams")


@torch.no_grad()
def test_exchanged_streams_of_hooks_by_hand_run_whole():
    family = BY_NAME["sd3"]
    model, inputs = family.build(), {**family.inputs(1), "return_dict": False}
    with PrefixReuse().apply(SimpleNamespace(transformer=model)) as applied:
        for _ in range(2):
            model(**inputs)
            _apply_layer_skip_hook(model, LayerSkipConfig([1, 2], fqn="transformer_blocks"), name="weak")
            out = model(**inputs)[0]
            HookRegistry.check_if_exists_or_initialize(model).remove_hook("weak", recurse=True)
    _apply_layer_skip_hook(model, LayerSkipConfig([1, 2], fqn="transformer_blocks"), name="weak")
    assert torch.equal(out, model(**inputs)[0])
    assert not applied.stats.reused and sum(applied.stats.not_reused.values()) == 2
