"""PrefixReuse on LTX-2: its STG and modality passes from where they differ, with the plain call's result."""

import dataclasses
import logging
from types import SimpleNamespace

import diffusers
import pytest
import torch
from helpers.native_calls import compared, ltx2_pipe, ltx2_row, near

import skipguide
from skipguide import SkipError, Skipper, SkipPlan
from skipguide.pipelines import PrefixReuse, SkipGuider, SpatiotemporalSkipGuidance
from zoo import modular
from zoo.family import randomise
from zoo.pipes import BY_PIPE, STEPS
from zoo.pipes_video import BY_VIDEO
from zoo.pipes_video_av import refine_pipe, run_refine
from zoo.video_av import ltx2_gated, ltx2_inputs

BLOCKS = 3  # of the zoo's LTX-2


OWN = [BY_VIDEO[f"ltx2_{name}"] for name in ("own", "rescaled", "i2v", "condition", "in_context", "hdr")]
own = pytest.mark.parametrize("case", OWN, ids=repr)


@own
@pytest.mark.parametrize("clips", [1, 2])
@pytest.mark.parametrize("layer", [1, 2])
def test_ltx2_is_the_plain_call_with_fewer_blocks(case, clips, layer):
    case = dataclasses.replace(case, clips=clips)
    plain, out, stats = compared(case, case.build(), spatio_temporal_guidance_blocks=[layer])
    near(out, plain)
    # [u, c], then STG and modality isolation for c; STG begins at its block
    assert stats.blocks_plain == STEPS * clips * 4 * BLOCKS
    assert stats.blocks_run == STEPS * clips * (4 * BLOCKS - layer)
    assert stats.passes == 3 * STEPS and stats.sublayers_reused == 4 * STEPS
    assert stats.reused == {"STG": STEPS, "modality isolation": STEPS} and not stats.not_reused


@pytest.mark.parametrize("name", ["ltx2_own", "ltx2_condition"])
def test_without_cfg_the_passes_have_one_batch_and_the_result_is_bit_equal(name):
    case = BY_VIDEO[name]
    plain, out, stats = compared(case, case.build(), cfg=False, spatio_temporal_guidance_blocks=[2])
    assert torch.equal(out, plain)
    assert stats.blocks_run == STEPS * case.clips * (3 * BLOCKS - 2)


@pytest.mark.parametrize(("blocks", "start"), [([2, 1], 1), ([1, 2, 7], 1), ([0, 2], 0)])
def test_the_pass_begins_at_the_first_perturbed_block(blocks, start):
    case = BY_VIDEO["ltx2_own"]
    plain, out, stats = compared(case, case.build(), spatio_temporal_guidance_blocks=blocks)
    near(out, plain)
    assert stats.blocks_run == STEPS * case.clips * (4 * BLOCKS - start)
    whole = {"STG whole: it differs from the first block on": STEPS}
    assert stats.not_reused == ({} if start else whole)


@pytest.mark.parametrize(
    ("off", "kinds"),
    [
        ({"stg_scale": 0.0, "audio_stg_scale": 0.0}, {"modality isolation"}),
        ({"modality_scale": 1.0, "audio_modality_scale": 1.0}, {"STG"}),
    ],
)
def test_each_of_the_passes_alone(off, kinds):
    case = BY_VIDEO["ltx2_own"]
    plain, out, stats = compared(case, case.build(), spatio_temporal_guidance_blocks=[2], **off)
    near(out, plain)
    assert set(stats.reused) == kinds and not stats.not_reused


def test_a_transformer_whose_attention_cannot_be_perturbed(caplog):
    """With perturbed_attn=False diffusers' LTX-2 ignores which blocks are to be perturbed, without a word."""
    case = BY_VIDEO["ltx2"]  # of the config that a checkpoint without the entry has
    pipe = case.build()
    assert not pipe.transformer.config.perturbed_attn
    asked = {"stg_scale": 1.0, "audio_stg_scale": 1.0, "spatio_temporal_guidance_blocks": [2]}
    with_its_stg, without = case.run(pipe, **asked), case.run(pipe)
    near(with_its_stg, without)  # so a pass a step is paid for nothing
    with caplog.at_level(logging.WARNING):
        _, out, stats = compared(case, pipe, **asked)
    near(out, without)
    assert stats.reused == {"STG that changes nothing (perturbed_attn=False in the config)": STEPS}
    assert "perturbs nothing in it" in caplog.text and "stg_scale=0.0, audio_stg_scale=0.0" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING), SpatiotemporalSkipGuidance([1]).apply(pipe, over_native=True):
        case.run(pipe, **asked)
    assert caplog.text.count("with perturbed_attn=False in the denoiser's config it changes nothing") == 1
    told = "changes nothing.*stg_scale=0.0, audio_stg_scale=0.0"
    with pytest.raises(SkipError, match=told), SpatiotemporalSkipGuidance([1]).apply(pipe):
        case.run(pipe, **asked)


def test_nothing_is_kept_when_a_call_is_over():
    case = BY_VIDEO["ltx2_own"]
    pipe = case.build()
    with PrefixReuse().apply(pipe) as applied:
        case.run(pipe, spatio_temporal_guidance_blocks=[2])
        (listener,) = applied._parts
        assert not any(state.calls or state.waiting for state in listener._threads.values())
    assert applied.pipe is None


def test_a_distilled_pipeline_makes_no_further_pass():
    """LTX2DFRPipeline, with one pass a step."""
    case = BY_VIDEO["ltx2_dfr"]
    plain, out, stats = compared(case, case.build())
    assert torch.equal(out, plain)
    assert stats.passes == STEPS and not stats.reused and not stats.not_reused


@pytest.mark.skipif(not hasattr(diffusers, "LTX2DFRTemporalRefinePipeline"), reason="an older diffusers")
def test_nor_does_the_one_that_refines_piece_by_piece():
    pipe = refine_pipe()
    plain = run_refine(pipe)
    with PrefixReuse().apply(pipe) as applied:
        assert torch.equal(run_refine(pipe), plain)
    assert applied.stats.passes == 2 * 2 and applied.stats.blocks_run == 4 * BLOCKS
    with pytest.raises(SkipError, match="a table of steps for every piece"):
        SpatiotemporalSkipGuidance([1]).apply(pipe)


def test_the_handle_is_found_and_removed():
    pipe = BY_VIDEO["ltx2"].build()
    applied = PrefixReuse().apply(pipe)
    assert skipguide.applied_to(pipe) == [applied] == skipguide.remove_from(pipe)
    assert skipguide.applied_to(pipe) == []
    with pytest.raises(SkipError, match="was removed"), applied:
        pass


def test_what_cannot_be_applied_to():
    pipe = BY_VIDEO["ltx2"].build()
    with pytest.raises(SkipError, match="pass the pipeline"):
        PrefixReuse().apply(pipe.transformer)
    with pytest.raises(SkipError, match="expected a pipeline with a transformer"):
        PrefixReuse().apply(SimpleNamespace())
    with PrefixReuse().apply(pipe), pytest.raises(SkipError, match="already: call remove"):
        PrefixReuse().apply(pipe)
    with PrefixReuse().apply(pipe):  # the refused one left the first alone
        pass


def test_a_pipeline_without_further_passes_is_left_alone_and_that_is_said(caplog):
    case = BY_PIPE["wan"]
    pipe = case.build()
    plain = case.run(pipe)
    with caplog.at_level(logging.WARNING), PrefixReuse().apply(pipe) as applied:
        out = case.run(pipe)
    assert torch.equal(out, plain)
    assert applied.stats.blocks_run == applied.stats.blocks_plain > 0
    assert "nothing was reused" in caplog.text and "no pass was a variant of another" in str(applied.stats)


# -- passes that are no variants --------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return randomise(ltx2_gated(), 1)


def stg(model, inputs, **changed):
    return model(**{**inputs, "spatio_temporal_guidance_blocks": [2], **changed})[0]


@torch.no_grad()
def two_passes(model, between=lambda pipe: None, **changed):
    """A plain call of two rows, something in between, and the STG call for the second; what it should give, and did."""
    both = {**ltx2_inputs(2), "return_dict": False}
    with PrefixReuse().apply(ltx2_pipe(model)) as applied:
        model(**both)
        between(model)
        out = stg(model, ltx2_row(both), **changed)
    assert torch.allclose(out, stg(model, ltx2_row(both), **changed), atol=1e-5)  # one row here, two in the plain call
    return applied.stats


def test_a_direct_call_is_reused_too(model):
    assert two_passes(model).reused == {"STG": 1}


@pytest.mark.parametrize(
    "changed",
    [
        {"hidden_states": torch.ones(1, 18, 8)},
        {"audio_hidden_states": torch.ones(1, 5, 8)},
        {"encoder_hidden_states": torch.ones(1, 5, 24)},
        {"timestep": torch.tensor([12.0])},
        {"sigma": torch.tensor([3.0])},
        {"fps": 12.0},
        {"use_cross_timestep": True},
        {"encoder_attention_mask": torch.tensor([[1, 1, 0, 0, 0]])},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_other_inputs_run_whole(model, changed):
    if "encoder_hidden_states" in changed:
        changed = {"encoder_hidden_states": torch.ones_like(ltx2_inputs(1)["encoder_hidden_states"])}
    if "encoder_attention_mask" in changed:
        mask = torch.ones_like(ltx2_inputs(1)["encoder_hidden_states"][..., 0])
        mask[:, -2:] = 0
        changed = {"encoder_attention_mask": mask}
    stats = two_passes(model, **changed)
    assert stats.not_reused == {"STG whole: its inputs are not those of an earlier pass": 1} and not stats.reused
    assert stats.blocks_run == stats.blocks_plain == 3 * BLOCKS


def in_place(model):
    model.transformer_blocks[1].ff.net[0].proj.weight.mul_(1.5)


def exchanged(model):
    model.proj_in.weight.data = model.proj_in.weight.data + 0.1


def another_parameter(model):
    model.transformer_blocks[0].scale_shift_table = torch.nn.Parameter(
        model.transformer_blocks[0].scale_shift_table + 1
    )


def a_hook(model):
    model.transformer_blocks[0].register_forward_hook(lambda module, args, out: (out[0] * 2, out[1]))


@pytest.mark.parametrize("change", [in_place, exchanged, another_parameter, a_hook], ids=lambda f: f.__name__)
def test_other_weights_run_whole(model, change):
    stats = two_passes(model, between=change)
    assert stats.not_reused == {"STG whole: the weights changed in between": 1}


@torch.no_grad()
def test_hooks_on_blocks_that_would_not_run_again(model):
    """A hook may count the passes, so that what it did in the plain one says nothing of the next."""
    calls = []
    model.transformer_blocks[1].ff.register_forward_hook(lambda module, args, out: calls.append(1) or out * len(calls))
    row = ltx2_row(ltx2_inputs(2))
    with PrefixReuse().apply(ltx2_pipe(model)) as applied:
        model(**row)
        out = stg(model, row)
    calls.pop()
    assert torch.equal(out, stg(model, row))
    assert applied.stats.not_reused == {
        "STG whole: hooks on the blocks before it may do something else in every pass": 1
    }


def test_weights_behind_the_start_may_change(model):
    def behind(model):
        model.transformer_blocks[2].ff.net[0].proj.weight.mul_(1.5)

    assert two_passes(model, between=behind).reused == {"STG": 1}


def test_an_input_that_was_written_to_in_between(model):
    both = {**ltx2_inputs(2), "return_dict": False}
    with torch.no_grad(), PrefixReuse().apply(ltx2_pipe(model)) as applied:
        model(**both)
        both["hidden_states"].mul_(2)  # the kept inputs say the same as the new ones: only their state tells
        out = stg(model, ltx2_row(both))
    assert applied.stats.not_reused == {"STG whole: an input was written to in between": 1}
    with torch.no_grad():
        assert torch.equal(out, stg(model, ltx2_row(both)))


@torch.inference_mode()
def test_in_inference_mode_inputs_are_compared_by_value(model):
    both = {**{k: v.clone() if torch.is_tensor(v) else v for k, v in ltx2_inputs(2).items()}, "return_dict": False}
    with PrefixReuse().apply(ltx2_pipe(model)) as applied:
        model(**both)
        near(stg(model, ltx2_row(both)), two_plain(model, both))
        model(**both)
        both["hidden_states"].mul_(2)
        out = stg(model, ltx2_row(both))
    assert torch.equal(out, stg(model, ltx2_row(both)))
    assert applied.stats.reused == {"STG": 1}
    assert applied.stats.not_reused == {"STG whole: its inputs are not those of an earlier pass": 1}


def two_plain(model, both):
    import copy

    return stg(copy.deepcopy(model), ltx2_row(both))


@torch.no_grad()
def test_a_pass_before_any_plain_one(model):
    row = ltx2_row(ltx2_inputs(2))
    with PrefixReuse().apply(ltx2_pipe(model)) as applied:
        stg(model, row)
        model(**row)
        stg(model, row)
        stg(model, row)  # what it starts from was let go of
    assert applied.stats.reused == {"STG": 1}
    assert sum(applied.stats.not_reused.values()) == 2


@torch.no_grad()
def test_a_place_that_nobody_foretold_is_kept_from_the_next_step_on(model):
    row = ltx2_row(ltx2_inputs(2))
    with PrefixReuse().apply(SimpleNamespace(transformer=model)) as applied:
        for _ in range(3):
            model(**row)
            out = stg(model, row)
        (listener,) = applied._parts
        (state,) = listener._threads.values()
        for _ in range(6):  # no such pass comes any more: its place is forgotten
            model(**row)
        assert not state.learned and not state.calls
    assert torch.equal(out, stg(model, row))
    assert applied.stats.reused == {"STG": 2}


@torch.no_grad()
def test_two_plain_calls_then_their_variants(model):
    """As modular pipelines call it: conditional, unconditional, then the further passes of the conditional one."""
    c, u = (ltx2_row(ltx2_inputs(2, seed), 0) for seed in (0, 1))
    with PrefixReuse().apply(ltx2_pipe(model, modality=True)) as applied:
        for first, second in ((c, u), (u, c)):
            model(**first), model(**second)
            outs = [stg(model, c), model(**c, isolate_modalities=True)[0]]
    assert torch.equal(outs[0], stg(model, c))
    assert torch.equal(outs[1], model(**c, isolate_modalities=True)[0])
    assert applied.stats.reused == {"STG": 2, "modality isolation": 2}


@torch.no_grad()
def test_rows_that_are_perturbed_in_the_batch_of_those_that_are_not(model):
    inputs = {**ltx2_row(ltx2_inputs(2)), "spatio_temporal_guidance_blocks": [2]}
    three = {k: v.repeat(3, *[1] * (v.dim() - 1)) if torch.is_tensor(v) else v for k, v in inputs.items()}
    three["hidden_states"] = three["hidden_states"].clone()
    three["hidden_states"][0] += 1
    mask = torch.tensor([1.0, 1.0, 0.0])
    expected = model(**three, perturbation_mask=mask)[0]
    with PrefixReuse().apply(ltx2_pipe(model)) as applied:
        near(model(**three, perturbation_mask=mask)[0], expected)
        three["hidden_states"][2] += 1  # now row 2 has the inputs of row 0 in this stream, and of row 1 in no other
        three["encoder_hidden_states"][2] += 1
        model(**three, perturbation_mask=mask)
    assert applied.stats.reused == {"STG": 1}
    assert applied.stats.not_reused == {"STG whole: its rows have inputs of their own": 1}
    assert applied.stats.blocks_run == (3 * BLOCKS - 2) + 3 * BLOCKS


# -- what stands in the way -------------------------------------------------------------------------------------------


def test_gradients_and_training_run_whole(model):
    row = ltx2_row(ltx2_inputs(2))
    with PrefixReuse().apply(ltx2_pipe(model)) as applied:
        model(**row)
        stg(model, row)
        with torch.no_grad():
            model.train()
            model(**row)
            stg(model, row)
            model.eval()
    assert set(applied.stats.not_reused) == {
        "STG whole: gradients are on",
        "STG whole: the model is in training mode, and dropout differs from pass to pass",
    }


@torch.no_grad()
def test_under_another_plan_passes_run_whole(model):
    row = ltx2_row(ltx2_inputs(2))
    with PrefixReuse().apply(ltx2_pipe(model)) as applied:
        model(**row)
        with Skipper(model, SkipPlan([0])):
            out = stg(model, row)
    with Skipper(model, SkipPlan([0])):
        assert torch.equal(out, stg(model, row))
    assert applied.stats.not_reused == {"STG whole: another plan of skipguide is active": 1}


# -- skipguide's own guidance -----------------------------------------------------------------------------------------


def test_together_with_skip_guidance_it_is_refused_in_either_order():
    pipe = BY_VIDEO["ltx2"].build()
    stg_guidance = SpatiotemporalSkipGuidance([1])
    with PrefixReuse().apply(pipe), pytest.raises(SkipError, match="PrefixReuse is applied"):
        stg_guidance.apply(pipe)
    with stg_guidance.apply(pipe), pytest.raises(SkipError, match="SpatiotemporalSkipGuidance is applied"):
        PrefixReuse().apply(pipe)
    assert skipguide.applied_to(pipe) == []


def test_together_with_a_skip_guider_it_is_refused():
    guider = SkipGuider([1], guidance_scale=3.0)
    pipe = modular.build("wan", guider=diffusers.ClassifierFreeGuidance(3.0))
    with PrefixReuse().apply(pipe), pytest.raises(SkipError, match="SkipGuider makes and shares"):
        guider.attach(pipe)
        modular.run(pipe)
    with pytest.raises(SkipError, match=r"pipe\.guider is a SkipGuider"):
        PrefixReuse().apply(pipe)
