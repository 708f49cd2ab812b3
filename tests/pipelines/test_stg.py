"""Skip guidance on every stock pipeline equals the reference and the published implementations, and leaves nothing."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from helpers.stg_reference import LAYER, SCALES, SOLVABLE, WITH_CFG, Reference, close, expected, guided, named
from safetensors.torch import load_file

from skipguide import SkipError, Timetable, find_blocks
from skipguide.pipelines import SpatiotemporalSkipGuidance
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.pipes import BY_PIPE, PIPES, understand_prompts

pytestmark = pytest.mark.numerics

# Skip guidance on every stock pipeline equals the reference: formulas, parts, rescaling, steps, videos.


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


@named([BY_PIPE["ltx"], BY_PIPE["wan"], BY_PIPE["hunyuan"]])
def test_window_of_steps(case):
    """Three steps: [1/3, 2/3) is the second one only."""
    out, stats = guided(case, Stg([LAYER], start=1 / 3, stop=2 / 3))
    close(out, expected(case, on={1}))
    assert stats.blocks_naive - stats.blocks_plain == len(find_blocks(case.build().transformer))


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


# Parity with the published implementations: outputs of theirs on tiny random models, stored in tests/golden.

GOLDEN = Path(__file__).parents[1] / "golden" / "stg"
PIPELINES = {"ltx": diffusers.LTXPipeline, "wan_euler": diffusers.WanPipeline}


def cases():
    for name in PIPELINES:
        doc = json.loads((GOLDEN / f"{name}.json").read_text())
        for case in doc["cases"]:
            # named as the reference's bugs, or (v1_Rattn) not a part that exists here
            if not case.startswith(("QUIRK", "v1_Rattn")) and "IGNORED" not in case and "off_nocfg" not in case:
                yield name, case


def load(name):
    doc = json.loads((GOLDEN / f"{name}.json").read_text())
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in doc["transformer_config"].items()}
    model = getattr(diffusers, doc["model"])(**config).eval()
    model.load_state_dict({k[12:]: v for k, v in tensors.items() if k.startswith("transformer.")})
    scheduler = getattr(diffusers, doc["scheduler"]["cls"]).from_config(doc["scheduler"]["config"])
    pipe = PIPELINES[name](transformer=model, scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe, doc, tensors


def arguments(name, case, doc, tensors):
    """The case's call, with the skip-guidance arguments taken out and translated."""
    entry = doc["cases"][case]
    call = dict(entry["call"])
    scale = call.pop("stg_scale", call.pop("skip_guidance_scale", 0.0))
    layers = call.pop("stg_applied_layers_idx", call.pop("skip_guidance_block_idxs", None))
    mode = call.pop("stg_mode", None)
    rescaling = call.pop("do_rescaling", False)
    unknown = [key for key in call if key.startswith("stg") or "rescal" in key]
    assert not unknown, unknown
    call |= {k[6:]: v[: entry["batch"]].clone() for k, v in tensors.items() if k.startswith("input.")}
    if not entry.get("negative", True):
        call = {k: v for k, v in call.items() if not k.startswith("negative")}
    settings = None
    if layers and scale:
        settings = SpatiotemporalSkipGuidance(
            layers=layers,
            scale=scale,
            part="attn_identity" if mode == "STG-A" else "block",
            formula="wan" if case.startswith("off_") else "stg",
            rescale=0.7 if rescaling else 0.0,
            rescale_over="batch",
        )
    return call | {"output_type": "latent", "return_dict": False}, settings


@pytest.mark.parametrize(("name", "case"), list(cases()))
def test_reference_output(name, case):
    pipe, doc, tensors = load(name)
    call, settings = arguments(name, case, doc, tensors)
    expected = tensors[f"out.{case}"]
    if settings is None:
        out = pipe(**call)[0]
    else:
        plain = pipe(**call)[0]
        with settings.apply(pipe) as applied:
            out = pipe(**call)[0]
        assert applied.stats.delivery == ("solve" if settings.rescale or settings.formula == "wan" else "shift")
        assert not torch.allclose(out, plain, atol=1e-3)
        assert torch.equal(pipe(**call)[0], plain)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=0)


# Skip guidance leaves nothing: after an exception, in a cache, after its handle is removed.


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


def test_a_handle_is_for_one_block():
    case = BY_PIPE["ltx"]
    pipe = case.build()
    with Stg([1]).apply(pipe) as applied:
        case.run(pipe)
    with pytest.raises(SkipError, match="was removed"), applied:
        case.run(pipe)


# Skip guidance on a pipeline of two denoisers: each can have layers of its own.


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


# Skip guidance beside the skip guidance that Stable Diffusion 3 has itself.


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
    with pytest.raises(SkipError, match=r"skip_guidance_layers=None.*PrefixReuse.*over_native=True"):
        guided(case, Stg([LAYER]), prompts=1, call=call)
    out, stats = guided(case, Stg([LAYER]), prompts=1, call=call, over_native=True)
    assert stats.delivery == "shift"
    close(out, expected(case, prompts=1, call=call))
