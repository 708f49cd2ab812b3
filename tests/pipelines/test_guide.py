"""Guide: each guider of diffusers on stock pipelines, against modular pipelines of the same weights or by hand."""

import json

import diffusers.guiders as home
import pytest
import torch
from helpers.guide_reference import GUIDERS, LAYER, W, by_hand
from helpers.residue import no_gates, traces
from helpers.stg_reference import close

from skipguide import SkipError, applied_to
from skipguide.pipelines import Guide, PrefixReuse
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo import modular
from zoo.family import rows
from zoo.pipes import BY_PIPE, MODELS, STEPS

pytestmark = pytest.mark.numerics

# what runs there in diffusers: its norm of magnitudes takes two dimensions at most, its pyramid wants images, its
# perturbed attention does not know the attention of Wan and LTX, and its blurred queries are never blurred
MODULAR = [name for name in GUIDERS if name not in ("fdg", "magnitude", "pag", "seg")]


def folded(x):
    """Videos [B, C, F, H, W] as images, and back."""
    return x.transpose(1, 2).flatten(0, 1)


def unfolded(x, frames=2):
    return x.unflatten(0, (-1, frames)).transpose(1, 2)


IMAGES = {
    "wan": (folded, lambda x: unfolded(x[..., :6, :6])),  # its pyramids are of the next powers of two
    "ltx": (
        lambda x: folded(x.transpose(1, 2).unflatten(2, (2, 3, 3))),
        lambda x: unfolded(x[..., :3, :3]).flatten(2).transpose(1, 2),
    ),
    "sd35": (lambda x: x, lambda x: x),
    "flux_true_cfg": (lambda x: x.transpose(1, 2).unflatten(2, (4, 4)), lambda x: x.flatten(2).transpose(1, 2)),
}


def guided(name, case_name, prompts=2, **call):
    if name == "fdg":
        pytest.importorskip("kornia")
    case = BY_PIPE[case_name]
    pipe = case.build()
    plain, before = case.run(pipe, prompts, **call), traces(pipe.transformer)
    with Guide(GUIDERS[name]()).apply(pipe) as applied:
        out = case.run(pipe, prompts, **call)
    assert not torch.allclose(out, plain, atol=1e-4), "the guider did nothing"
    assert torch.equal(case.run(pipe, prompts, **call), plain), "something is left on the pipeline"
    assert traces(pipe.transformer) == before
    no_gates(pipe.transformer)
    return out, applied.stats


@pytest.mark.parametrize("case_name", ["wan", "ltx"])
@pytest.mark.parametrize("name", MODULAR)
def test_a_classic_pipeline_gives_what_the_modular_one_does(name, case_name):
    """The pipeline's own CFG scale (5 and 3) is another than the guider's."""
    latents = modular.latents(2) if case_name == "wan" else rows(2, 5, 2 * 3 * 3, 8)
    pipe = modular.build(case_name, guider=GUIDERS[name]())
    call = {} if case_name == "wan" else modular.ltx_inputs(2)
    expected = modular.run(pipe, 2, latents=latents, **call)
    out, _ = guided(name, case_name, latents=latents)
    packed = case_name == "wan" or expected.ndim == 3  # of LTX before diffusers 0.42 as the denoiser has them
    close(out, expected if packed else expected.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("case_name", list(W))
@pytest.mark.parametrize("name", GUIDERS)
def test_every_guider_equals_itself_by_hand(name, case_name):
    out, stats = guided(name, case_name)
    close(out, by_hand(name, case_name, images=IMAGES[case_name] if name == "fdg" else None))
    assert stats.delivery == "solve"


def test_weakened_passes_start_at_the_first_weakened_block():
    blocks = len(MODELS["ltx"].block_names)
    _, stats = guided("slg", "ltx", 1)
    weak = STEPS - 1  # diffusers' window leaves the first step out
    assert stats.blocks_run == STEPS * 2 * blocks + weak * (blocks - 1 - LAYER)
    _, stats = guided("pag", "ltx", 1)
    assert stats.blocks_run == STEPS * 2 * blocks + weak * (blocks - LAYER)
    _, stats = guided("cfg in a window", "wan", 1)
    assert stats.passes == 2 + 1 + 1, "of three steps one has guidance"


@pytest.mark.parametrize("name", GUIDERS)
def test_a_guide_goes_to_json_and_comes_back(name):
    if name == "fdg":
        pytest.importorskip("kornia")
    guide = Guide(GUIDERS[name]())
    data = json.loads(json.dumps(guide.to_dict()))
    again = Guide.from_dict(data)
    assert again == guide
    assert again.to_dict() == data
    assert again != Guide(home.ClassifierFreeGuidance(guidance_scale=5.5))
    assert data["guider"]["class"] == type(guide.guider).__name__


def test_positional_arguments_are_kept_in_json():
    """diffusers itself counts them as defaults, and drops them."""
    guide = Guide(home.ClassifierFreeGuidance(3.0))
    assert Guide.from_dict(guide.to_dict()).guider.guidance_scale == 3.0


@pytest.mark.parametrize("case_name", ["ltx", "wan"])
def test_a_second_model_takes_the_unconditional_place(case_name):
    """Without CFG it gets the conditional inputs: the paper's form, c' + w (c - c')."""
    case, w = BY_PIPE[case_name], 2.0
    pipe, weak = case.build(), case.build(seed=7).transformer
    with Guide(home.ClassifierFreeGuidance(w)).apply(pipe, weak_model=weak) as applied:
        out = case.run(pipe, 2, cfg=False)
        both = case.run(pipe, 2)
    plain = pipe.transformer.forward

    def forward(*args, **kwargs):
        c, k = plain(*args, **kwargs)[0], weak(*args, **kwargs)[0]
        return (k + w * (c - k),)

    pipe.transformer.forward = forward
    close(out, case.run(pipe, 2, cfg=False))
    assert not torch.allclose(out, both, atol=1e-3)
    assert applied.stats.blocks_run


def test_autoguidance_without_cfg_weakens_the_conditional_pass():
    case = BY_PIPE["ltx"]
    pipe = case.build()
    with Guide(GUIDERS["autoguidance"]()).apply(pipe) as applied:
        out = case.run(pipe, 2, cfg=False)
    plain, weak = pipe.transformer.forward, MODELS["ltx"].identity_block(pipe.transformer, LAYER)

    def forward(*args, **kwargs):
        c, k = plain(*args, **kwargs)[0], weak(*args, **kwargs)[0]
        return (k + 2.0 * (c - k),)

    pipe.transformer.forward = forward
    close(out, case.run(pipe, 2, cfg=False))
    assert applied.layers == {"transformer": (LAYER,)}


@pytest.mark.parametrize("case_name", ["wan", "ltx", "wan22", "hunyuan15", "cogvideox_dynamic", "latte"])
def test_other_ways_of_calling(case_name):
    """Two experts, a guider component, a scale that changes after the forward, variances that nobody uses."""
    case = BY_PIPE[case_name]
    pipe = case.build()
    with Guide(home.ClassifierFreeGuidance(guidance_scale=1.0)).apply(pipe) as applied:
        out = case.run(pipe, 2)
    assert applied.stats.passes <= 2 * STEPS
    conditional = case.build()
    plain, first = conditional.transformer.forward, case.cfg_modes[0] == "batched"

    def doubled(model):
        forward, seen = model.forward, []

        def both(*args, **kwargs):
            out = forward(*args, **kwargs)
            if first:
                c = out[0].chunk(2)[1]
                return (torch.cat([c, c]), *out[1:])
            seen.append(out)
            return seen[-1] if len(seen) % 2 else seen[-2]

        model.forward = both

    assert plain is not None
    for name in ("transformer", "transformer_2"):
        if getattr(conditional, name, None) is not None:
            doubled(getattr(conditional, name))
    close(out, case.run(conditional, 2))


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guider", "words"),
    [
        (5.0, "expected a guider of diffusers"),
        (home.ClassifierFreeGuidance, "expected a guider of diffusers"),
        ({"class": "Nobody", "config": {}}, "unknown guider 'Nobody'"),
        ({"class": "ClassifierFreeGuidance", "config": {"w": 1}}, "does not take this config"),
        ({"class": "ClassifierFreeGuidance"}, "its 'class' and its 'config'"),
    ],
)
def test_what_is_no_guider_is_refused(guider, words):
    with pytest.raises(SkipError, match=words):
        Guide(guider)


def test_a_guider_with_passes_of_another_kind_is_refused():
    with pytest.raises(SkipError, match="pred_cond_stg, pred_cond_modality"):
        Guide(home.LTX2Guidance())


@pytest.mark.parametrize("case_name", ["ltx", "wan", "flux"])
def test_a_run_without_cfg_is_refused_where_the_guider_needs_it(case_name):
    case = BY_PIPE[case_name]
    pipe = case.build()
    with Guide(GUIDERS["apg"]()).apply(pipe), pytest.raises(SkipError, match="turn its CFG on"):
        case.run(pipe, cfg=False)
    no_gates(pipe.transformer)


def test_a_scale_of_one_in_the_second_call_is_refused():
    case = BY_PIPE["wan22"]
    pipe = case.build()
    with Guide(GUIDERS["cfg"]()).apply(pipe), pytest.raises(SkipError, match="has a CFG scale of 1 here"):
        case.run(pipe, guidance_scale_2=1.0)


def test_guidance_on_guidance_is_refused():
    pipe = BY_PIPE["ltx"].build()
    with Guide(GUIDERS["cfg"]()).apply(pipe) as applied:
        assert applied_to(pipe) == [applied]
        with pytest.raises(SkipError, match="already applied"):
            Guide(GUIDERS["cfg"]()).apply(pipe)
        with pytest.raises(SkipError, match="already applied"):
            Stg([1]).apply(pipe)
    with PrefixReuse().apply(pipe), pytest.raises(SkipError, match="PrefixReuse is applied"):
        Guide(GUIDERS["cfg"]()).apply(pipe)


def test_layers_that_are_not_there_are_refused():
    pipe = BY_PIPE["ltx"].build()
    guider = home.SkipLayerGuidance(skip_layer_config=home.skip_layer_guidance.LayerSkipConfig([99]))
    with pytest.raises(SkipError, match="99"):
        Guide(guider).apply(pipe)
    no_gates(pipe.transformer)


def test_an_interrupted_run_leaves_nothing():
    case = BY_PIPE["wan"]
    pipe = case.build()
    plain = case.run(pipe)

    def stop(pipe, step, timestep, values):
        raise KeyboardInterrupt

    with Guide(GUIDERS["slg"]()).apply(pipe) as applied:
        once = case.run(pipe)
        with pytest.raises(KeyboardInterrupt):
            case.run(pipe, callback_on_step_end=stop)
        assert torch.equal(case.run(pipe), once)
    applied.remove()
    assert torch.equal(case.run(pipe), plain)
