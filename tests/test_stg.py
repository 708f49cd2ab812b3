"""Skip guidance on every stock pipeline, against a reference that knows nothing of gates, prefixes or shifts.

The reference replaces the denoiser's forward by plain code: full passes of the model and of a deep copy with the block
taken out, the formula in float64, delivered through the branch weights that the test knows.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch

from skipguide import NoEffectError, SkipError, SkipPlan, Timetable, find_blocks
from skipguide.guidance import rescale
from skipguide.pipelines import SkipGroup
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.pipes import BY_PIPE, MODELS, PIPES, understand_prompts

LAYER = 1
SCALES = {
    "ltx": 3.0, "ltx_i2v": 3.0, "wan": 5.0, "wan_ti2v": 5.0, "wan22": 5.0, "wan_i2v": 5.0, "cogvideox": 6.0,
    "cogvideox_i2v": 6.0, "mochi": 4.5, "hunyuan_true_cfg": 4.0, "hunyuan15": 6.0, "latte": 7.5, "sd3": 7.0,
    "sd35": 7.0, "flux_true_cfg": 4.0,
}  # fmt: skip
WITH_CFG = [c for c in PIPES if c.cfg_modes[0] != "single"]
SOLVABLE = [c for c in WITH_CFG if c.name not in ("hunyuan_true_cfg", "flux_true_cfg", "cogvideox_dynamic")]
SHARED = ("image_rotary_emb", "txt_ids", "img_ids")


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=repr)


def edited(case, model, part, layer=LAYER):
    family = MODELS[case.family]
    if part == "block":
        return family.identity_block(model, layer)
    return family.zeroed(model, layer, part)


class Reference:
    """Guidance by hand at one denoiser, installed on the instance for the length of a test."""

    def __init__(self, pipe, case, name="transformer", *, w, cfg=True, part="block", s=1.0, **how):
        self.model = getattr(pipe, name)
        self.weak = edited(case, self.model, part)
        self.mode = case.cfg_modes[0] if cfg else "single"
        self.w, self.s, self.how = w, s, how
        self.calls, self.steps, self.cond = 0, 0, None
        self.plain = self.model.forward
        self.model.forward = self

    def __call__(self, *args, **kwargs):
        out = self.plain(*args, **kwargs)
        if kwargs.get("skip_layers"):  # the pipeline's own skip pass; c is as it was
            return out
        self.calls += 1
        if self.mode == "batched":
            u, c = out[0].double().chunk(2)
            weak = self.weak(*args, **kwargs)[0].double()
            return (torch.cat([*self.branches(u, c, *weak.chunk(2))]).to(out[0].dtype), *out[1:])
        weak = self.weak(*args, **kwargs)[0].double()
        this = out[0].double()
        if self.mode == "single":
            y = self.finish(this + self.delta(this, weak), this)
            return (y.to(out[0].dtype), *out[1:])
        if self.calls % 2:
            self.cond = (this, weak)
            return out
        u, _ = self.branches(this, self.cond[0], weak, self.cond[1])
        return (u.to(out[0].dtype), *out[1:])

    def delta(self, plain, weak):
        self.steps += 1
        on = self.how.get("on")
        return self.s * (plain - weak) * (1.0 if on is None or self.steps - 1 in on else 0.0)

    def finish(self, y, c):
        amount = self.how.get("rescale", 0.0)
        return rescale(y, c, amount, self.how.get("over", "sample")) if amount else y

    def branches(self, u, c, weak_u, weak_c):
        """(u', c) for which the pipeline's CFG gives the formula's result."""
        formula = self.how.get("formula", "stg")
        if formula == "uncond":
            return weak_u, c
        if self.w is None:  # dynamic: the scale is not known at this point, so both branches are moved
            d = self.delta(c, weak_c)
            return u + d, c + d
        y = u + self.w * (c - u)
        y = y + (self.delta(y, weak_u) if formula == "wan" else self.delta(c, weak_c))
        y = self.finish(y, c)
        return (y - self.w * c) / (1 - self.w), c


def expected(case, cfg=True, prompts=2, part="block", call=None, **how):
    pipe = case.build()
    Reference(pipe, case, w=SCALES.get(case.name), cfg=cfg, part=part, **how)
    if getattr(pipe, "transformer_2", None) is not None:
        Reference(pipe, case, "transformer_2", w=3.0, cfg=cfg, part=part, **how)
    return case.run(pipe, prompts, cfg, **(call or {}))


def guided(case, stg, cfg=True, prompts=2, call=None):
    pipe = case.build()
    plain = case.run(pipe, prompts, cfg, **(call or {}))
    with stg.apply(pipe) as applied:
        out = case.run(pipe, prompts, cfg, **(call or {}))
    assert not torch.allclose(out, plain, atol=1e-4), "the guidance did nothing"
    assert torch.equal(case.run(pipe, prompts, cfg, **(call or {})), plain), "something is left on the pipeline"
    return out, applied.stats


def close(out, reference):
    size = reference.abs().max().item()
    torch.testing.assert_close(out, reference, atol=2e-5 * max(size, 1.0), rtol=0)


@named(PIPES)
def test_guided_pipeline_equals_the_reference(case):
    out, stats = guided(case, Stg([LAYER], scale=1.5))
    close(out, expected(case, s=1.5))
    n, steps, branches = len(find_blocks(case.build().transformer)), 3, 2 if case in WITH_CFG else 1
    assert stats.delivery == "shift"
    assert stats.blocks_plain == steps * branches * n
    assert stats.blocks_naive == steps * (branches + 1) * n
    assert stats.blocks_run == steps * (branches * n + n - 1 - LAYER)


@named([c for c in WITH_CFG if "single" in c.cfg_modes])
def test_without_cfg(case):
    out, stats = guided(case, Stg([LAYER]), cfg=False)
    close(out, expected(case, cfg=False))
    assert stats.passes == 6


@named([BY_PIPE[name] for name in ("ltx", "wan", "latte", "cogvideox", "sd3", "flux_true_cfg")])
@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_sublayer_parts(case, part):
    out, _ = guided(case, Stg([LAYER], part=part))
    close(out, expected(case, part=part))


@named(SOLVABLE)
@pytest.mark.parametrize("formula", ["uncond", "wan"])
def test_other_formulas(case, formula):
    out, stats = guided(case, Stg([LAYER], formula=formula))
    close(out, expected(case, formula=formula))
    n = len(find_blocks(case.build().transformer))
    assert stats.blocks_run == 3 * (2 * n - 1 if formula == "uncond" else 2 * n + n - 1 - LAYER)
    assert stats.delivery == ("solve" if formula == "wan" else "shift")


@named(SOLVABLE)
@pytest.mark.parametrize("over", ["sample", "batch"])
def test_rescale(case, over):
    out, stats = guided(case, Stg([LAYER], rescale=0.7, rescale_over=over))
    close(out, expected(case, rescale=0.7, over=over))
    assert stats.delivery == "solve"


@named([BY_PIPE["ltx"], BY_PIPE["hunyuan"], BY_PIPE["flux"]])
def test_rescale_without_cfg(case):
    out, _ = guided(case, Stg([LAYER], rescale=0.7), cfg=False)
    close(out, expected(case, cfg=False, rescale=0.7))


def test_the_pipelines_own_rescale_is_noticed():
    case, call = BY_PIPE["ltx"], {"guidance_rescale": 0.7}
    out, stats = guided(case, Stg([LAYER]), call=call)
    close(out, expected(case, call=call))
    assert stats.delivery == "solve"


@named(WITH_CFG)
def test_prefix_reuse_changes_nothing_but_the_cost(case):
    out, stats = guided(case, Stg([LAYER, 2]), prompts=1)
    full, naive = guided(case, Stg([LAYER, 2], prefix_reuse=False), prompts=1)
    close(out, full)
    if case.cfg_modes[0] == "two_calls":
        assert torch.equal(out, full)
    assert naive.blocks_run - stats.blocks_run == 3 * LAYER


@named([BY_PIPE["ltx"], BY_PIPE["wan"], BY_PIPE["hunyuan"]])
def test_window_of_steps(case):
    """Three steps: [1/3, 2/3) is the second one only."""
    out, stats = guided(case, Stg([LAYER], start=1 / 3, stop=2 / 3))
    close(out, expected(case, on={1}))
    assert stats.blocks_naive - stats.blocks_plain == len(find_blocks(case.build().transformer))


def test_every_reuses_the_last_difference():
    case = BY_PIPE["wan"]
    call = {"num_inference_steps": 4}
    out, stats = guided(case, Stg([LAYER], every=2), call=call)
    exact, _ = guided(case, Stg([LAYER]), call=call)
    assert stats.passes == 2 * 4 + 2
    assert 0 < (out - exact).abs().max() < (exact.abs().max())


@named([BY_PIPE["ltx"], BY_PIPE["wan"]])
def test_several_videos_per_prompt(case):
    call = dict.fromkeys(
        ("prompt_embeds", "negative_prompt_embeds", "prompt_attention_mask", "negative_prompt_attention_mask")
    )
    call = {k: v for k, v in call.items() if k in case.call_kwargs()} | {
        "prompt": ["a cat", "a dog"], "negative_prompt": "blurry", "num_videos_per_prompt": 2,
    }  # fmt: skip

    def run(pipe):
        understand_prompts(pipe)
        return case.run(pipe, 1, True, **call)

    reference = case.build()
    Reference(reference, case, w=SCALES[case.name])
    pipe = case.build()
    with Stg([LAYER]).apply(pipe):
        out = run(pipe)
    assert out.shape[0] == 4
    close(out, run(reference))


def test_each_denoiser_can_have_its_own_layers():
    case = BY_PIPE["wan22"]
    pipe = case.build()
    with Stg({"transformer": [1], "transformer_2": [2]}).apply(pipe) as applied:
        out = case.run(pipe)
    assert applied.layers == {"transformer": (1,), "transformer_2": (2,)}
    with Stg([1]).apply(pipe):
        assert not torch.equal(out, case.run(pipe))
    with pytest.raises(SkipError, match="transformer_2"):
        Stg({"transformer": [1]}).apply(pipe)


def test_each_denoiser_can_have_layers_of_its_own_kind():
    case = BY_PIPE["wan22"]
    pipe, table = case.build(), Timetable([(0.0, (1,)), (0.5, (2,))])
    with Stg({"transformer": table, "transformer_2": [1, 2]}).apply(pipe) as applied:
        case.run(pipe)
    assert applied.layers == {"transformer": (1, 2), "transformer_2": (1, 2)}
    with pytest.raises(SkipError, match="no preset"):
        Stg({"transformer": None, "transformer_2": [1]}).apply(pipe)


@named(PIPES)
def test_scale_zero_is_bit_equal_and_free(case):
    pipe = case.build()
    plain = case.run(pipe)
    with Stg([LAYER], scale=0).apply(pipe) as applied:
        assert torch.equal(case.run(pipe), plain)
    assert applied.stats.blocks_run == applied.stats.blocks_plain == applied.stats.blocks_naive


@named(PIPES)
def test_cost_is_foretold(case):
    pipe = case.build()
    for stg in (Stg([LAYER, 3]), Stg([LAYER], part="attn"), Stg([2], prefix_reuse=False)):
        cost = stg.cost(pipe, guidance=case in WITH_CFG)
        with stg.apply(pipe) as applied:
            case.run(pipe)
        assert applied.stats.blocks_run == 3 * cost.blocks_per_step
        assert applied.stats.blocks_naive == 3 * cost.blocks_naive
        assert applied.stats.to_dict()["blocks_plain"] == 3 * cost.blocks_plain


@named(PIPES)
def test_no_residue_after_an_exception_in_the_model(case):
    pipe = case.build()
    plain = case.run(pipe)
    before = [(name, sorted(m.__dict__)) for name, m in pipe.transformer.named_modules()]
    block = find_blocks(pipe.transformer)[2].module
    handle = block.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), Stg([LAYER]).apply(pipe):
        case.run(pipe)
    handle.remove()
    assert [(name, sorted(m.__dict__)) for name, m in pipe.transformer.named_modules()] == before
    assert torch.equal(case.run(pipe), plain)


def test_a_run_after_an_exception_starts_afresh():
    """An exception between the two calls of a step must not make the next run's first call an unconditional one."""
    case = BY_PIPE["wan"]
    pipe = case.build()
    expected_out, _ = guided(case, Stg([LAYER]), prompts=1)
    block = find_blocks(pipe.transformer)[2].module
    with Stg([LAYER]).apply(pipe):
        handle = block.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            case.run(pipe)
        handle.remove()
        assert torch.equal(case.run(pipe), expected_out)


def test_skipped_pass_has_its_own_cache_context(monkeypatch):
    case = BY_PIPE["wan"]
    pipe = case.build()
    names = []
    original = type(pipe.transformer).cache_context

    def listening(self, name, **where):
        names.append(name)
        return original(self, name, **where)

    monkeypatch.setattr(type(pipe.transformer), "cache_context", listening)
    with Stg([LAYER]).apply(pipe):
        case.run(pipe)
    assert names == ["cond", "skip", "uncond"] * 3
    assert "cache_context" not in pipe.transformer.__dict__


def test_sd3_leaves_the_pipelines_own_skip_pass_alone():
    case = BY_PIPE["sd35"]
    call = {"skip_guidance_layers": [2], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    pipe = case.build()
    with Stg([LAYER], scale=0).apply(pipe):
        out = case.run(pipe, **call)
    assert torch.equal(out, case.run(pipe, **call))


def test_sd3s_own_skip_guidance_does_not_amplify_ours():
    """It adds a multiple of c - its own skipped pass, so what is added to c must be added to that pass too."""
    case = BY_PIPE["sd35"]
    call = {"skip_guidance_layers": [2], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    out, stats = guided(case, Stg([LAYER]), prompts=1, call=call)
    assert stats.delivery == "shift"
    close(out, expected(case, prompts=1, call=call))


# -- bad input ----------------------------------------------------------------------------------------------------


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
        ({"layers": [1], "start": None}, "start"),
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


def test_a_handle_is_for_one_block():
    case = BY_PIPE["ltx"]
    pipe = case.build()
    with Stg([1]).apply(pipe) as applied:
        case.run(pipe)
    with pytest.raises(SkipError, match="was removed"), applied:
        case.run(pipe)


@pytest.mark.parametrize("steps", [0, -1, 2.5])
def test_a_cost_is_of_some_steps(steps):
    with pytest.raises(SkipError, match="steps is a whole number"):
        Stg([1]).cost(BY_PIPE["ltx"].build(), steps=steps)


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
    with pytest.raises(SkipError, match="no denoiser"):
        Stg([1]).apply(type("LTXPipeline", (), {"transformer": None})())
    with Stg([1]).apply(pipe), pytest.raises(SkipError, match="already applied"):
        Stg([2]).apply(pipe)
    assert [(name, sorted(m.__dict__)) for name, m in pipe.transformer.named_modules()] == before


def test_other_guiders_are_refused():
    import diffusers

    pipe = BY_PIPE["hunyuan15"].build()
    pipe.guider = diffusers.AdaptiveProjectedGuidance()
    with pytest.raises(SkipError, match="AdaptiveProjectedGuidance"):
        Stg([1]).apply(pipe)


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


def test_solve_needs_a_visible_scale():
    case = BY_PIPE["hunyuan_true_cfg"]
    pipe = case.build()
    with pytest.raises(SkipError, match="true_cfg_scale"), Stg([1], rescale=0.7).apply(pipe):
        case.run(pipe)
    dynamic = BY_PIPE["cogvideox_dynamic"]
    pipe = dynamic.build()
    with pytest.raises(SkipError, match="use_dynamic_cfg"), Stg([1], rescale=0.7).apply(pipe):
        dynamic.run(pipe)


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
