"""Our own recipe for LTX-2 against what its pipelines do: equal to rounding, with the skipped pass a part of one."""

import itertools

import pytest
import torch
from helpers.residue import no_gates
from helpers.stg_reference import close

from skipguide import SkipError, Timetable
from skipguide.pipelines import SkipGroup, SkipGuider
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.pipes import STEPS
from zoo.pipes_video import BY_VIDEO

pytestmark = pytest.mark.numerics
BLOCKS, LAYER = 3, 2  # of the zoo's LTX-2
SCALES = {"video": 0.7, "audio": 0.4}
NAMES = ("own", "rescaled", "i2v", "condition", "in_context")
CASES = [BY_VIDEO[f"ltx2_{name}"] for name in NAMES]
cases = pytest.mark.parametrize("case", CASES, ids=repr)
OFF = {"stg_scale": 0.0, "audio_stg_scale": 0.0}
ALONE = {"modality_scale": 1.0, "audio_modality_scale": 1.0}
NATIVE = {"stg_scale": 0.7, "audio_stg_scale": 0.4, "spatio_temporal_guidance_blocks": [LAYER]}


def recipe(**changed):
    return Stg(**{"layers": [LAYER], "scale": SCALES, "part": "attn_identity"} | changed)


# -- through `apply` --------------------------------------------------------------------------------------------------


@cases
@pytest.mark.parametrize("alone", [{}, ALONE], ids=["modality pass", "no modality pass"])
def test_attn_identity_is_the_native_stg_with_a_scale_each(case, alone):
    """The pipeline's own modality pass and rescale stay, and act on our guidance as on its own."""
    pipe = case.build()
    expected = case.run(pipe, **NATIVE, **alone)
    with recipe().apply(pipe) as applied:
        close(case.run(pipe, **OFF, **alone), expected)
    no_gates(pipe.transformer)
    assert torch.equal(case.run(pipe, **NATIVE, **alone), expected), "something is left on the pipeline"
    # [u, c] whole, and the skipped pass from its block on; the modality pass is the pipeline's own
    assert applied.stats.blocks_run == STEPS * (2 * BLOCKS + BLOCKS - LAYER)
    assert applied.stats.blocks_naive == STEPS * 3 * BLOCKS


@pytest.mark.parametrize("name", ["ltx2_own", "ltx2_condition"])
def test_without_cfg_too(name):
    case = BY_VIDEO[name]
    pipe = case.build()
    expected = case.run(pipe, cfg=False, **NATIVE)
    with recipe().apply(pipe):
        close(case.run(pipe, cfg=False, **OFF), expected)


@cases
@pytest.mark.parametrize("cfg", [True, False])
def test_our_rescale_is_the_native_one(case, cfg):
    """It acts on denoised samples, and on video and sound apart, as the pipelines' own does."""
    if not (cfg or case.lone):
        pytest.skip("its call without CFG rescales by itself")
    pipe = case.build()
    both = {"guidance_rescale": 0.6, "audio_guidance_rescale": 0.6}
    none = {"guidance_rescale": 0.0, "audio_guidance_rescale": 0.0}
    expected = case.run(pipe, cfg, **NATIVE, **ALONE, **both)
    with recipe(rescale=0.6).apply(pipe):
        close(case.run(pipe, cfg, **OFF, **ALONE, **none), expected)


def test_where_the_sound_is_thrown_away_the_video_alone_is_guided():
    case = BY_VIDEO["ltx2_hdr"]
    pipe = case.build()
    native = {"stg_scale": 0.7, "spatio_temporal_guidance_blocks": [LAYER]}
    for both in ({}, {"guidance_rescale": 0.6}):
        expected = case.run(pipe, **native, **both)
        with recipe(scale=0.7).apply(pipe):
            close(case.run(pipe, stg_scale=0.0, **both), expected)
    expected = case.run(pipe, **native, modality_scale=1.0, guidance_rescale=0.6)
    with recipe(scale=0.7, rescale=0.6).apply(pipe):
        close(case.run(pipe, stg_scale=0.0, modality_scale=1.0), expected)
    with pytest.raises(SkipError, match="predicts one thing"):
        recipe().apply(pipe)


class ByHand:
    """LTX-2's further guidance in float64, on x0 of video and sound apart, in place of the model's forward."""

    def __init__(self, pipe, scales, apg=None, norm=None, star=False):
        self.pipe, self.scales, self.apg, self.norm, self.star = pipe, scales, apg, norm, star
        self.plain, self.step = pipe.transformer.forward, itertools.count()
        pipe.transformer.forward = self

    def __call__(self, hidden_states, audio_hidden_states, **call):
        given = {"hidden_states": hidden_states, "audio_hidden_states": audio_hidden_states, **call}
        out = self.plain(**given)
        weak = self.plain(**given | {"spatio_temporal_guidance_blocks": [LAYER]})
        sigma = self.pipe.scheduler.sigmas[next(self.step) % STEPS].double()
        made = []
        samples = (hidden_states, audio_hidden_states)
        for plain, skipped, sample, s, w in zip(out, weak, samples, self.scales, (3.0, 5.0), strict=True):
            x = sample.double().chunk(2)[0]
            u, c = (x - sigma * each.double() for each in plain.chunk(2))
            k = x - sigma * skipped.double().chunk(2)[1]
            dims = tuple(range(1, c.dim()))
            if self.star:
                u = (c * u).sum(dims, keepdim=True) / (u * u).sum(dims, keepdim=True) * u
            d = c - k
            if self.norm is not None:
                d = d * (self.norm / d.norm(dim=dims, keepdim=True)).clamp(max=1.0)
            if self.apg is not None:
                along = (d * c).sum(dims, keepdim=True) / (c * c).sum(dims, keepdim=True) * c
                d = d - along + self.apg * along
            y = u + w * (c - u) + s * d
            u = (y - w * c) / (1 - w)
            made.append(torch.cat([(x - u) / sigma, plain.double().chunk(2)[1]]).float())
        return tuple(made)


@pytest.mark.parametrize(
    ("settings", "by_hand"),
    [
        ({"apg": 0.2}, {"apg": 0.2}),
        ({"apg": 0.0, "apg_norm": 0.5}, {"apg": 0.0, "norm": 0.5}),
        ({"zero_star": True}, {"star": True}),
    ],
    ids=["apg", "apg with a norm", "CFG-Zero*"],
)
def test_what_looks_at_whole_predictions_looks_at_each_apart(settings, by_hand):
    case = BY_VIDEO["ltx2_own"]
    pipe = case.build()
    with recipe(**settings).apply(pipe):
        out = case.run(pipe, **OFF, **ALONE)
    ByHand(pipe, SCALES.values(), **by_hand)
    expected = case.run(pipe, **OFF, **ALONE)
    close(out, expected)
    del pipe.transformer.forward
    with recipe().apply(pipe):
        assert not torch.allclose(case.run(pipe, **OFF, **ALONE), expected, atol=1e-3), "it did nothing"


def test_one_modality_alone_and_timetables():
    case = BY_VIDEO["ltx2_own"]
    pipe = case.build()
    expected = case.run(pipe, **NATIVE | {"stg_scale": 1.0, "audio_stg_scale": 1.0}, **ALONE)
    table = Timetable([(0.0, 1.0)])
    with recipe(scale={"video": table, "audio": 1.0}).apply(pipe):
        close(case.run(pipe, **OFF, **ALONE), expected)
    with recipe(scale=1.0).apply(pipe):
        close(case.run(pipe, **OFF, **ALONE), expected)
    groups = [SkipGroup([LAYER], {"video": part, "audio": part}, "attn_identity") for part in (0.25, 0.75)]
    with Stg(groups=groups).apply(pipe):
        close(case.run(pipe, **OFF, **ALONE), expected)
    with recipe(scale={"video": 0.0, "audio": 0.0}).apply(pipe) as applied:
        assert torch.equal(case.run(pipe, **OFF, **ALONE), case.run(pipe, **OFF, **ALONE))
    assert applied.stats.blocks_run == applied.stats.blocks_plain


def test_the_sound_alone_is_guided():
    case = BY_VIDEO["ltx2_own"]
    pipe = case.build()
    # audio_stg_scale or stg_scale, says the pipeline: 0 for the sound alone cannot be said there
    expected = case.run(pipe, **NATIVE | {"stg_scale": 0.0}, **ALONE)
    with recipe(scale={"video": 0.0, "audio": 0.4}).apply(pipe):
        close(case.run(pipe, **OFF, **ALONE), expected)


@pytest.mark.skipif("kandinsky6" not in BY_VIDEO, reason="diffusers has no Kandinsky 6")
def test_kandinsky_6_has_two_scales_too():
    case = BY_VIDEO["kandinsky6"]
    pipe = case.build()
    with Stg([case.layer], scale=0.8).apply(pipe):
        expected = case.run(pipe)
    with Stg([case.layer], scale={"video": 0.8, "audio": 0.8}).apply(pipe):
        assert torch.equal(case.run(pipe), expected)
    with Stg([case.layer], scale={"video": 0.8, "audio": 0.0}).apply(pipe):
        assert not torch.allclose(case.run(pipe), expected, atol=1e-4)
    silent = BY_VIDEO["kandinsky6_silent"]
    with Stg([case.layer], scale={"video": 0.8, "audio": 0.8}, rescale=0.5).apply(pipe):
        assert torch.isfinite(silent.run(pipe)).all()


def test_forty_eight_blocks_take_2_417_passes_where_the_native_ones_take_3():
    """The published depth, at a tiny width."""
    from zoo.family import randomise

    case = BY_VIDEO["ltx2_own"]
    pipe = case.build()
    config = {**pipe.transformer.config, "num_layers": 48}
    pipe.transformer = randomise(type(pipe.transformer).from_config(config), 1, 0.1)
    native = NATIVE | {"spatio_temporal_guidance_blocks": [28]}
    expected = case.run(pipe, **native, **ALONE)
    with recipe(layers=[28]).apply(pipe) as applied:
        close(case.run(pipe, **OFF, **ALONE), expected)
    run = applied.stats.blocks_run / (STEPS * 48)
    assert run == 2 + (48 - 28) / 48 and round(run, 3) == 2.417
    assert applied.stats.blocks_naive == STEPS * 3 * 48
    assert not torch.allclose(expected, case.run(pipe, **OFF, **ALONE), atol=1e-3), "STG did nothing"


# -- bad input --------------------------------------------------------------------------------------------------------


def test_scales_of_modalities_that_are_not_there_are_refused():
    for pipe, words in (
        (BY_VIDEO["wan_vace"].build(), "predicts one thing: give a number"),
        (BY_VIDEO["ltx2_own"].build(), "predicts video and audio: give one for each"),
    ):
        with pytest.raises(SkipError, match=words):
            Stg([1], scale={"video": 1.0}).apply(pipe)
        with pytest.raises(SkipError, match=words):
            Stg(groups=[SkipGroup([1], {"sound": 1.0})]).apply(pipe)
        no_gates(pipe.transformer)


@pytest.mark.parametrize("scale", [{}, {1: 1.0}, {"video": "1"}, {"video": float("nan")}, {"video": {"audio": 1.0}}])
def test_mappings_that_mean_nothing(scale):
    with pytest.raises(SkipError):
        Stg([1], scale=scale)
    with pytest.raises(SkipError):
        SkipGuider([1], guidance_scale=scale)


def test_the_recipe_goes_through_json(tmp_path):
    table = Timetable([(0.0, 0.0), (0.5, 1.0)])
    for scale in (SCALES, {"video": table, "audio": 1}):
        stg = recipe(scale=scale, rescale=Timetable([(0.0, 0.7)]), apg=0.1)
        stg.save_json(tmp_path / "stg.json", overwrite=True)
        assert Stg.load_json(tmp_path / "stg.json") == stg
