"""CFG scale, rescale and layers that change with the step, against plain code; and a published recipe as one JSON."""

import pytest
import torch
from helpers.residue import no_gates
from helpers.stg_reference import SCALES, close

from skipguide import SkipError, Timetable, find_blocks
from skipguide.pipelines import SkipGroup, SkipGuider, presets
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from skipguide.pipelines.presets import PRESETS, KnownModel, Preset
from zoo import modular
from zoo.pipes import BY_PIPE, MODELS

pytestmark = pytest.mark.numerics
STEPS = 4
CASES = pytest.mark.parametrize("name", ["ltx", "wan", "latte"])
LAYERS, WEIGHTS, CFG, RESCALE = (
    ((1,), (), (0, 2), (2,)),
    (1.5, 2.0, 0.5, 1.0),
    (6.0, 3.0, 1.0, 4.0),
    (0.0, 0.7, 1.0, 0.5),
)


def by_step(*values):
    return Timetable([(step / STEPS, value) for step, value in enumerate(values)])


def run(case, pipe, **call):
    return case.run(pipe, 2, True, num_inference_steps=STEPS, **call)


def by_hand(case, layers=LAYERS, weights=WEIGHTS, cfg=CFG, rescale=RESCALE, formula="stg"):
    """Everything computed in full, in float64, and delivered through the unconditional branch."""
    pipe = case.build()
    model, plain, w = pipe.transformer, pipe.transformer.forward, SCALES[case.name]
    family, state = MODELS[case.family], {"calls": 0}
    weak = {}
    for blocks in set(layers):
        weak[blocks] = model
        for block in blocks:
            weak[blocks] = family.identity_block(weak[blocks], block)

    def result(step, u, c, k, ku):
        if formula == "uncond" and layers[step]:
            u = ku
        y = u + cfg[step] * (c - u)
        if formula == "uncond" or not layers[step]:
            return y
        y = y + weights[step] * ((y - ku) if formula == "wan" and cfg[step] != 1 else (c - k))
        dims = tuple(range(1, y.dim()))
        ratio = c.std(dims, keepdim=True) / y.std(dims, keepdim=True)
        return y * (rescale[step] * ratio + 1 - rescale[step])

    def forward(*args, **kwargs):
        out = plain(*args, **kwargs)[0].double()
        batched = case.cfg_modes[0] == "batched"
        step, second = divmod(state["calls"], 1 if batched else 2)
        state["calls"] += 1
        other = out if not layers[step] else weak_forward(weak[layers[step]], args, kwargs)
        if batched:
            (u, c), (ku, k) = out.chunk(2), other.chunk(2)
            y = result(step, u, c, k, ku)
            return (torch.cat([y, y]).float(),)
        if not second:
            state["c"], state["k"] = out, other
            return (out.float(),)
        y = result(step, out, state["c"], state["k"], other)
        return (((y - w * state["c"]) / (1 - w)).float(),)

    def weak_forward(weak, args, kwargs):
        own = weak.__dict__.pop("forward", None)  # a copy of the model has this function too
        try:
            return type(weak).forward(weak, *args, **kwargs)[0].double()
        finally:
            if own is not None:
                weak.forward = own

    model.forward = forward
    return run(case, pipe)


@CASES
def test_cfg_scale_rescale_and_layers_by_the_step(name):
    case = BY_PIPE[name]
    pipe = case.build()
    plain = run(case, pipe)
    stg = Stg(by_step(*LAYERS), by_step(*WEIGHTS), rescale=by_step(*RESCALE), guidance_scale=by_step(*CFG))
    with stg.apply(pipe) as applied:
        out = run(case, pipe)
    close(out, by_hand(case))
    assert torch.equal(run(case, pipe), plain)
    n = len(find_blocks(pipe.transformer))
    # step 1 skips nothing; step 2 has no CFG, and leaves out blocks 0 and 2
    assert applied.stats.blocks_run == (7 * n) + (n - 2) + (n - 2) + (n - 3)
    assert applied.delivery == "solve"
    cost = stg.cost(case.build(), steps=STEPS)
    assert cost.blocks_per_step * STEPS == applied.stats.blocks_run


@CASES
@pytest.mark.parametrize("formula", ["wan", "uncond"])
def test_other_formulas_with_a_cfg_scale_by_the_step(name, formula):
    case = BY_PIPE[name]
    pipe = case.build()
    layers, cfg = ((1,), (), (0, 2), (2,)), (6.0, 3.0, 2.0, 4.0)
    weights = (1.0,) * STEPS
    stg = Stg(by_step(*layers), 1.0, formula=formula, guidance_scale=by_step(*cfg))
    with stg.apply(pipe):
        out = run(case, pipe)
    close(out, by_hand(case, layers, weights, cfg, (0.0,) * STEPS, formula))


def test_a_constant_cfg_scale_is_that_of_the_call():
    case = BY_PIPE["ltx"]
    pipe = case.build()
    with Stg([1], 1.5).apply(pipe):
        expected = run(case, pipe, guidance_scale=6.0)
    with Stg([1], 1.5, guidance_scale=6.0).apply(pipe):
        close(run(case, pipe, guidance_scale=2.0), expected)
    plain = run(case, pipe, guidance_scale=6.0)
    with Stg(scale=0.0, guidance_scale=6.0).apply(pipe):  # no skip guidance: a timetable for CFG alone
        close(run(case, pipe, guidance_scale=2.0), plain)


def test_it_reaches_pipelines_whose_own_scale_is_not_what_it_seems():
    """Where both branches are one call, two equal ones give that whatever w is; here it changes after the forward."""
    case = BY_PIPE["cogvideox_dynamic"]
    pipe = case.build()
    with Stg([1], 1.5, guidance_scale=4.0).apply(pipe):
        out = run(case, pipe)
    static = BY_PIPE["cogvideox"]
    with Stg([1], 1.5).apply(static.build()) as applied:
        close(out, run(static, applied.pipe, guidance_scale=4.0))


def test_tables_by_the_noise_level():
    case = BY_PIPE["ltx"]
    pipe = case.build()
    run(case, pipe)
    sigmas = [float(sigma) for sigma in pipe.scheduler.sigmas[:STEPS]]
    over = {"over": "sigma"}
    tables = (Timetable(list(zip(sigmas, values, strict=True)), **over) for values in (LAYERS, WEIGHTS, RESCALE, CFG))
    layers, scale, rescale, cfg = tables
    with Stg(layers, scale, rescale=rescale, guidance_scale=cfg).apply(pipe):
        close(run(case, pipe), by_hand(case))


# -- empty lists of layers --------------------------------------------------------------------------------------------


def test_groups_may_pause():
    case = BY_PIPE["wan"]
    pipe = case.build()
    groups = (SkipGroup(by_step((1,), (), (), ())), SkipGroup(by_step((), (), (2,), ()), 0.5))
    with Stg(groups=groups).apply(pipe) as applied:
        run(case, pipe)
    n = len(find_blocks(pipe.transformer))
    assert applied.stats.blocks_run == STEPS * 2 * n + (n - 2) + (n - 3)
    assert applied.layers == {"transformer": (1, 2)}


def test_a_run_that_meets_empty_lists_only_is_refused():
    case = BY_PIPE["ltx"]
    pipe = case.build()
    table = Timetable([(0.0, []), (0.9, [1])])
    with pytest.raises(SkipError, match=f"none of the {STEPS} steps"), Stg(table).apply(pipe):
        run(case, pipe)
    no_gates(pipe.transformer)
    with pytest.raises(SkipError, match="every list of layers in the timetable is empty"):
        Stg(Timetable([(0.0, []), (0.5, [])]))


# -- bad input --------------------------------------------------------------------------------------------------------


def test_a_guiders_cfg_scale_by_the_step_is_that_of_apply():
    case = BY_PIPE["wan"]
    table = by_step(6.0, 3.0, 1.0, 4.0)
    pipe = case.build()
    with Stg([1], 1.5, guidance_scale=table).apply(pipe) as applied:
        expected = case.run(pipe, 2, True, num_inference_steps=STEPS, latents=modular.latents(2))
    guided = modular.build("wan")
    guider = SkipGuider([1], 1.5, guidance_scale=table).attach(guided)
    close(modular.run(guided, 2, num_inference_steps=STEPS), expected)
    assert guider.stats.blocks_run == applied.stats.blocks_run


def test_without_cfg_a_cfg_scale_is_refused():
    for name in ("ltx", "wan"):
        case = BY_PIPE[name]
        pipe = case.build()
        with (
            pytest.raises(SkipError, match="guidance_scale is a scale of CFG"),
            Stg([1], guidance_scale=3.0).apply(pipe),
        ):
            case.run(pipe, 1, cfg=False)
        no_gates(pipe.transformer)


def test_a_second_scale_of_1_has_no_branch_to_deliver_it_through():
    case = BY_PIPE["wan22"]
    pipe = case.build()
    with pytest.raises(SkipError, match="no weight"), Stg([1], guidance_scale=3.0).apply(pipe):
        run(case, pipe, guidance_scale_2=1.0)


def test_a_cache_would_take_left_out_passes_for_its_steps():
    from diffusers import TaylorSeerCacheConfig

    table = Timetable([(0.0, 4.0), (0.5, 1.0)])
    pipe = BY_PIPE["wan"].build()
    pipe.transformer.enable_cache(TaylorSeerCacheConfig(cache_identifiers=[r"blocks\.\d+\.attn1"]))
    with pytest.raises(SkipError, match="guidance_scale, which is 1 at some step, leaves passes"):
        Stg([1], guidance_scale=table).apply(pipe)
    Stg([1], guidance_scale=4.0).apply(pipe).remove()
    guided = modular.build("wan")
    guided.transformer.enable_cache(TaylorSeerCacheConfig(cache_identifiers=[r"blocks\.\d+\.attn1"]))
    SkipGuider([1], guidance_scale=table).attach(guided)
    with pytest.raises(SkipError, match="no CFG at some steps, which leaves passes out"):
        modular.run(guided)


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": "3"},
        {"guidance_scale": {"video": 3.0}},
        {"guidance_scale": Timetable([(0.0, [1])])},
        {"rescale": Timetable([(0.0, 1.5)])},
        {"rescale": -0.1},
        {"rescale": {"video": 0.5}},
        {"rescale": Timetable([(0.0, 0.5)]), "formula": "uncond"},
    ],
    ids=str,
)
def test_settings_that_mean_nothing(settings):
    with pytest.raises(SkipError):
        Stg([1], **settings)


# -- a published recipe -----------------------------------------------------------------------------------------------


def test_the_recipe_of_ltx_13b_is_one_json(tmp_path, monkeypatch):
    """Lightricks' lists over sigma: of CFG scales, skip scales, rescales and blocks."""
    (known,) = (each for each in PRESETS if each.name == "LTX-Video 13B")
    recipe = Stg().filled(known.preset)
    recipe.save_json(tmp_path / "13b.json")
    again = Stg.load_json(tmp_path / "13b.json")
    assert again == recipe
    at = {1.0: 0, 0.9933: 1, 0.99: 1, 0.985: 2, 0.98: 2, 0.9767: 3, 0.95: 3, 0.9008: 4, 0.7: 4, 0.618: 5, 0.1: 5}
    lists = {
        "guidance_scale": (1, 6, 8, 6, 1, 1),
        "scale": (0, 4, 4, 4, 2, 1),
        "rescale": (1, 0.5, 0.5, 1, 1, 1),
        "layers": ((12,), (12,), (5,), (5,), (28,), (29,)),
    }
    for sigma, place in at.items():
        assert {name: getattr(again, name).at(0.0, sigma) for name in lists} == {
            name: values[place] for name, values in lists.items()
        }


def test_it_is_the_preset_and_runs(monkeypatch):
    """The same lists on the tiny LTX, whose blocks are fewer, as the preset that `layers=None` takes."""
    case = BY_PIPE["ltx"]
    pipe = case.build()
    run(case, pipe)
    sigmas = [float(sigma) for sigma in pipe.scheduler.sigmas[:STEPS]]
    lists = (((0,), (1,), (2,), (2,)), (0.0, 4.0, 4.0, 1.0), (1.0, 0.5, 0.5, 1.0), (1.0, 6.0, 8.0, 1.0))
    layers, scale, rescale, cfg = (Timetable(list(zip(sigmas, each, strict=True)), over="sigma") for each in lists)
    preset = Preset(layers, scale, "here", rescale=rescale, guidance_scale=cfg)
    config = pipe.transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    known = KnownModel("tiny", type(pipe.transformer).__name__, len(find_blocks(pipe.transformer)), width, preset)
    monkeypatch.setattr(presets, "PRESETS", (known,))
    found = Stg().for_pipeline(pipe)
    assert found == Stg.from_dict(found.to_dict()) == Stg(layers, scale, rescale=rescale, guidance_scale=cfg)
    with Stg().apply(pipe) as applied:
        out = run(case, pipe)
    close(out, by_hand(case, lists[0], lists[1], lists[3], lists[2]))
    n = len(find_blocks(pipe.transformer))
    assert applied.stats.blocks_run == 6 * n + (n - 2) + 2 * (n - 3)
    assert Stg(guidance_scale=3.0).for_pipeline(pipe).guidance_scale == 3.0, "what is said holds"
