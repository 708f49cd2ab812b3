"""Guidance away from a perturbed self on stock pipelines equals guidance by hand with the perturbed model by hand."""

import random

import pytest
import torch
from helpers.perturbation_table import PERTURBATIONS
from helpers.stg_reference import LAYER, WITH_CFG, close, expected, guided

from skipguide import SkipError, find_blocks
from skipguide.pipelines import SkipGroup, SkipGuider
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo import perturbed
from zoo.pipes import BY_PIPE, MODELS, STEPS

pytestmark = pytest.mark.numerics

CASES = [BY_PIPE[name] for name in ("ltx", "wan", "cogvideox", "hunyuan", "sd35", "flux_true_cfg")]
cases = pytest.mark.parametrize("case", CASES, ids=repr)


def by_hand(case, row):
    return lambda model: row.by_hand(MODELS[case.family], model, LAYER)


@cases
@pytest.mark.parametrize("name", [name for name in PERTURBATIONS if name != "shuffle"])
def test_a_perturbed_pass_equals_the_reference(case, name):
    row = PERTURBATIONS[name]
    if not row.fits(case.family):
        pytest.skip("a picture has one frame")
    out, stats = guided(case, Stg([LAYER], part=row.part, scale=1.5, **row.told))
    close(out, expected(case, part=by_hand(case, row), s=1.5))
    n, branches = len(find_blocks(case.build().transformer)), 2 if case in WITH_CFG else 1
    assert stats.blocks_run == STEPS * (branches * n + n - LAYER)
    assert stats.delivery == "shift"


class Drawn:
    """The order of a step: the same for all passes of it, another one at the next."""

    def __init__(self, case, seed):
        self.passes = 2 if case.cfg_modes[0] == "two_calls" else 1
        self.seed = seed
        self.calls = 0

    def __call__(self, x):
        step, self.calls = self.calls // self.passes, self.calls + 1
        drawn = random.Random(f"{self.seed} 0 0 {step}").getrandbits(32)
        return perturbed.shuffle(drawn, LAYER)(x)


@cases
def test_a_shuffle_is_drawn_anew_at_every_step_and_the_same_in_every_run(case):
    family, settings = MODELS[case.family], Stg([LAYER], part="token_shuffle", seed=7)
    out, _ = guided(case, settings)
    reference = expected(case, part=lambda model: perturbed.moved(family, model, LAYER, Drawn(case, 7)))
    close(out, reference)
    torch.manual_seed(123)
    assert torch.equal(guided(case, settings)[0], out)
    assert not torch.allclose(guided(case, Stg([LAYER], part="token_shuffle", seed=8))[0], out, atol=1e-4)


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_a_batched_tail_and_whole_passes_give_the_same(name):
    """Which rows run together, and from where, does not matter to a perturbation."""
    case = BY_PIPE[name]
    for part in ("token_shuffle", "attn_blur", "self_swap"):
        apart, _ = guided(case, Stg([LAYER], part=part))
        for other in ({"tail": "batched"}, {"prefix_reuse": False}):
            close(guided(case, Stg([LAYER], part=part, **other))[0], apart)


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_inside_the_unconditional_pass(name):
    case, row = BY_PIPE[name], PERTURBATIONS["blur"]
    out, stats = guided(case, Stg([LAYER], part="attn_blur", formula="uncond", **row.told))
    close(out, expected(case, part=by_hand(case, row), formula="uncond"))
    assert stats.blocks_run == STEPS * 2 * len(find_blocks(case.build().transformer))


def test_heads_by_layer_and_groups_with_parts_of_their_own():
    """One pass perturbs a head here and another there; a group is a pass of its own."""
    case = BY_PIPE["cogvideox"]
    family, told = MODELS[case.family], {"heads": {1: [0], 2: [1]}, "strength": 0.8}

    def weak(model):
        for layer, head in ((1, 0), (2, 1)):
            attend = perturbed.towards_identity(0.8, (head,))
            model = perturbed.written_out(family, model, layer, family.inputs(1), attend)
        return model

    out, stats = guided(case, Stg([2, 1], part="attn_identity", **told))
    close(out, expected(case, part=weak))
    assert stats.passes == 2 * STEPS
    heads = SkipGroup([2, 1], 1.0, "attn_identity", **told)
    both = Stg(groups=[SkipGroup([LAYER], 1.0, "window_time"), heads])
    assert Stg.from_dict(both.to_dict()) == both
    apart = [guided(case, Stg(groups=[each]))[0] for each in both.groups]
    close(apart[1], out)
    made, stats = guided(case, both)
    assert stats.passes == 3 * STEPS and not any(torch.allclose(made, each, atol=1e-4) for each in apart)


def test_strength_zero_is_the_plain_pipeline_to_the_bit_and_one_the_part():
    case = BY_PIPE["ltx"]
    pipe = case.build()
    plain = case.run(pipe, 2)
    with Stg([LAYER], strength=0).apply(pipe) as applied:
        assert torch.equal(case.run(pipe, 2), plain)
    assert applied.stats.passes == STEPS
    assert torch.equal(guided(case, Stg([LAYER], strength=1))[0], guided(case, Stg([LAYER]))[0])
    half, _ = guided(case, Stg([LAYER], strength=0.5))
    assert 0 < (half - plain).norm() < (guided(case, Stg([LAYER]))[0] - plain).norm()


def test_settings_with_options_go_to_json_and_to_a_guiders_config():
    told = {"part": "attn_blur", "strength": 0.5, "heads": {1: [0]}, "part_options": {"sigma": 2.0}}
    stg = Stg([1], **told)
    assert Stg.from_dict(stg.to_dict()) == stg
    guider = SkipGuider([1], **told)
    assert SkipGuider.from_config(guider.config).settings == guider.settings == stg


BAD = {
    "has no option sigma": {"part_options": {"sigma": 1.0}},
    "not about heads": {"heads": [0]},
    "given in the groups": {"layers": None, "groups": [SkipGroup([1])], "strength": 0.5},
}


@pytest.mark.parametrize("words", BAD)
def test_settings_that_cannot_be_meant_are_refused(words):
    with pytest.raises(SkipError, match=words):
        Stg(**{"layers": [1]} | BAD[words])


def test_what_a_model_cannot_do_is_refused_when_it_is_applied():
    pipe = BY_PIPE["flux"].build()
    for settings, words in (
        (Stg([1], part="window_time"), "one frame"),
        (Stg([1], part="attn_identity", heads=[9]), "2 heads"),
        (Stg([1, 2], part="attn_identity", heads={1: [0]}), "got layer 2 too"),
    ):
        with pytest.raises(SkipError, match=words):
            settings.apply(pipe)
