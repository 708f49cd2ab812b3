"""Guidance in bfloat16 and float16: what each pipeline's loop takes, and no more error than a fork that guides."""

from dataclasses import replace

import diffusers
import pytest
import torch
from helpers.half_precision import cases, lowered, relative, takes_float32

from skipguide.guidance import cfg
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from skipguide.pipelines.registry import pipeline_spec
from skipguide.pipelines.registry.described import PIPELINES
from zoo.pipes import BY_PIPE, MODELS, placed
from zoo.pipes_image import IMAGE_PIPES

IMAGES = {case.name: case for case in IMAGE_PIPES}
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' own, in float64
HALF = (torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", HALF, ids=["bfloat16", "float16"])
# the stock pipelines themselves fail with a tiny model in half precision on the CPU
ALONE = {"longcat", "svd"}
FEW = ("ltx", "wan", "sd3", "flux_true_cfg", "zimage")


def found(name):
    """The case that a pipeline is, by giving its loop float32 predictions."""
    build, run = cases()[name]
    spec = pipeline_spec(build())
    if all(takes_float32(build, run, dtype) for dtype in HALF):
        return "float32", spec
    return "once" if spec.cfg in ("batched", "single") else "rounded", spec


@pytest.mark.parametrize("name", FEW)
def test_the_field_says_what_the_loop_takes(name):
    case, spec = found(name)
    assert spec.half == case


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`callback")  # how Kandinsky's combined pipelines call their decoders
@pytest.mark.parametrize("name", sorted(set(cases()) - set(FEW) - ALONE))
def test_the_field_says_what_every_loop_takes(name):
    case, spec = found(name)
    assert spec.half == case


def test_every_pipeline_has_a_case_that_finds_it():
    tested = {type(build()).__name__ for name, (build, _) in cases().items() if name not in ALONE}
    there = {name for name in PIPELINES if hasattr(diffusers, name)}  # an older diffusers lacks some
    assert there - tested <= {"LongCatImagePipeline", "StableVideoDiffusionPipeline"}
    assert PIPELINES["LongCatImagePipeline"].half == "rounded", "not proven to be more"


class Fork:
    """A fork of the pipeline that guides by itself: full passes in the model's dtype, the sum in float32.

    `deliver` says what its loop goes on with: the sum itself, or the sum in the model's dtype.
    """

    def __init__(self, case, pipe, w, s, deliver):
        self.mode, self.w, self.s, self.deliver = case.cfg_modes[0], w, s, deliver
        self.weak = MODELS[case.family].identity_block(pipe.transformer, 1)
        self.plain, self.kept = pipe.transformer.forward, None
        pipe.transformer.forward = self

    def __call__(self, *args, **kwargs):
        out = self.plain(*args, **kwargs)[0]
        dtype = out.dtype if out.dtype == torch.float64 else torch.float32
        if self.mode == "batched":
            weak = self.weak(*args, **kwargs)[0]
            (u, c), k = out.to(dtype).chunk(2), weak.to(dtype).chunk(2)[1]
            y = cfg(u, c, self.w) + self.s * (c - k)
            y = y if self.deliver == "float32" else y.to(out.dtype)
            return (torch.cat([y, y]),)
        if self.kept is None:
            self.kept = out.to(dtype), self.weak(*args, **kwargs)[0].to(dtype)
            return (self.kept[0],)
        (c, k), self.kept = self.kept, None
        y = cfg(out.to(dtype), c, self.w) + self.s * (c - k)
        return ((y - self.w * c) / (1 - self.w),)


LAW = {"ltx": 3.0, "sd3": 7.0, "wan": 5.0, "cogvideox": 6.0, "mochi": 4.5, "latte": 7.5}
QUICK = 2


def errors(name, dtype, seeds):
    """Mean error against float64 of a fork in that dtype, and of guidance on the stock pipeline."""
    case, w, s = BY_PIPE[name], LAW[name], 1.0
    exact, forked, stock = (lowered(case.build(), each) for each in (torch.float64, dtype, dtype))
    for pipe in (exact, forked):
        Fork(case, pipe, w, s, pipeline_spec(pipe).half)
    sums = [0.0, 0.0]
    shape = case.run(exact, num_inference_steps=2).shape  # Mochi divides by half of the steps
    with Stg([1], scale=s).apply(stock) as applied:
        for seed in range(seeds):
            # drawn once, and to the bit the same in every dtype: pipelines draw another number in each
            drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().double()
            call = {"num_inference_steps": 2, "guidance_scale": w, "latents": drawn}
            runs = [case.run(pipe, **placed(call, pipe)) for pipe in (exact, forked, stock)]
            for i in (0, 1):
                sums[i] += relative(runs[i + 1], runs[0]) / seeds
    return *sums, applied.stats


@dtypes
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow][: i >= QUICK]) for i, name in enumerate(LAW)]
)
def test_guidance_is_as_exact_as_a_fork_that_guides(name, dtype):
    """Cases (a) and (b): float32 branches, and the result in place of both branches."""
    seeds = 20
    fork, ours, stats = errors(name, dtype, seeds)
    assert 1e-5 < fork < 0.3, "the error is that of the dtype"
    assert ours <= 1.05 * fork, (ours, fork)
    assert (stats.rounding is None) == (PIPELINES[type(BY_PIPE[name].build()).__name__].half == "float32")


@pytest.mark.parametrize("name", ["ltx", "sd3"])
def test_branches_that_are_rounded_apart_are_further_off(name, monkeypatch):
    """What the law is about: the pipeline multiplies the difference of the branches by w."""
    build, run = cases()[name]
    cls, found = type(build()).__name__, {}
    for half in ("as described", "rounded"):
        if half == "rounded":
            monkeypatch.setitem(PIPELINES, cls, replace(PIPELINES[cls], half=half))
        pipe = lowered(build(), torch.bfloat16)
        with Stg([1]).apply(pipe) as applied:
            run(pipe, num_inference_steps=1, guidance_scale=7.0)
        found[half] = applied.stats.rounding or 0.0
    assert found["rounded"] > 0.003
    assert found["as described"] < found["rounded"] / 2


@dtypes
@pytest.mark.parametrize("name", ["flux_true_cfg", "hunyuan_true_cfg"])
def test_two_calls_in_the_models_dtype_say_their_error(name, dtype):
    """Case (c): sqrt(w^2 + (w - 1)^2) times the rounding of a prediction, which is 0.15 % of it in bfloat16."""
    case, w = BY_PIPE[name], 4.0
    pipe = lowered(case.build(), dtype)
    plain, seen = pipe.transformer, []
    with Stg([1]).apply(pipe) as applied:
        assert case.run(pipe).dtype == dtype
    weak = MODELS[case.family].identity_block(plain, 1)

    def note(module, args, kwargs, output):
        c = output[0].float()
        k = weak(*args, **kwargs)[0].float()
        seen.append(float(c.norm() / (c - k).norm()))

    hook = plain.register_forward_hook(note, with_kwargs=True)
    case.run(pipe)
    hook.remove()
    share = sum(seen[::2]) / len(seen[::2])
    each = 0.00154 if dtype == torch.bfloat16 else 0.00154 / 8
    expected = each * share * (w**2 + (w - 1) ** 2) ** 0.5
    assert expected / 1.6 < applied.stats.rounding < expected * 1.6
    assert f"rounding moves its term by {applied.stats.rounding:.1%}" in str(applied.stats)


@pytest.mark.parametrize("name", ["ltx", "wan", "sd3", "flux_true_cfg"])
def test_a_wide_model_has_nothing_to_round(name):
    case = BY_PIPE[name]
    pipe = case.build()
    with Stg([1]).apply(pipe) as applied:
        case.run(pipe)
    assert applied.stats.rounding is None


def test_settings_beyond_the_default_run_in_half_precision():
    """Rescaled, projected, starred, and the STG authors' Wan formula."""
    for case in (BY_PIPE["ltx"], BY_PIPE["wan"], BY_PIPE["sd3"], BY_PIPE["flux_true_cfg"], IMAGES["zimage"]):
        for how in ({"rescale": 0.7}, {"zero_star": True}, {"apg": 0.3}, {"formula": "wan"}, {"formula": "uncond"}):
            pipe = lowered(case.build(), torch.bfloat16)
            plain = case.run(pipe)
            with Stg([1], **how).apply(pipe):
                out = case.run(pipe)
            assert out.dtype == plain.dtype
            assert torch.isfinite(out.float()).all()
