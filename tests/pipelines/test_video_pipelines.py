"""Skip guidance on the further video pipelines, against a reference that knows nothing of gates, prefixes or shifts."""

import inspect

import diffusers
import pytest
import torch

from skipguide import SkipError, find_blocks
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from skipguide.pipelines.registry.described import PIPELINES, native_off
from zoo.pipes_video import BY_VIDEO, MODELS, VIDEO_PIPES

SCALE, STEPS = 1.5, 3
# diffusers' Karras sigmas and first-frame timesteps hand tensors to numpy in a way that numpy 2 warns of
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
FORMULAS = ("cosmos", "hunyuan_i2v", "kandinsky6", "ltx2", "skyreels_df")


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=repr)


class ByHand:
    """Guidance in plain code: the skipped model is run in full, and delivered through the unconditional branch."""

    def __init__(self, pipe, case, cfg, formula="stg"):
        self.model, self.case, self.formula = pipe.transformer, case, formula
        self.weak = MODELS[case.family].identity_block(self.model, case.layer)
        self.mode = case.mode if cfg else "single"
        self.cond, self.plain = None, self.model.forward
        self.model.forward = self

    def __call__(self, *args, **kwargs):
        out = self.plain(*args, **kwargs)
        if kwargs.get("spatio_temporal_guidance_blocks") or kwargs.get("isolate_modalities"):
            return self.like(out, [x.double() + d for x, d in zip(self.guided(out), self.lone_delta(), strict=True)])
        weak = [x.double() for x in self.guided(self.weak(*args, **kwargs))]
        this = [x.double() for x in self.guided(out)]
        if self.mode == "single":
            self.delta = [SCALE * (c - k) for c, k in zip(this, weak, strict=True)]
            return self.like(out, [c + d for c, d in zip(this, self.delta, strict=True)])
        if self.mode == "batched":
            halves = [(*x.chunk(2), *k.chunk(2)) for x, k in zip(this, weak, strict=True)]
            made = [self.uncond(u, c, ku, kc, w) for (u, c, ku, kc), w in zip(halves, self.case.w, strict=True)]
            return self.like(out, [torch.cat([u, h[1]]) for u, h in zip(made, halves, strict=True)])
        if self.cond is None:
            self.cond = this, weak
            return out
        (c, kc), self.cond = self.cond, None
        return self.like(out, [self.uncond(*each) for each in zip(this, c, weak, kc, self.case.w, strict=True)])

    def lone_delta(self):
        """Without CFG every branch of a step is moved; with it only the unconditional one."""
        return self.delta if self.mode == "single" else [0.0] * len(self.case.w)

    def uncond(self, u, c, weak_u, weak_c, w):
        """The u' for which u' + w (c - u') is the formula's result."""
        y = u + w * (c - u)
        y = y + SCALE * ((y - weak_u) if self.formula == "wan" else (c - weak_c))
        return (y - w * c) / (1 - w)

    def guided(self, out):
        """The predictions that are guided: one has no scale where the pipeline throws it away."""
        return self.parts(out)[: len(self.case.w)]

    @staticmethod
    def parts(out):
        return [out] if isinstance(out, torch.Tensor) else list(out if isinstance(out, tuple) else out.values())

    @classmethod
    def like(cls, out, values):
        made = [value.to(torch.float32) for value in values]
        made += cls.parts(out)[len(made) :]
        if isinstance(out, torch.Tensor):
            return made[0]
        return tuple(made) if isinstance(out, tuple) else type(out)(**dict(zip(out, made, strict=True)))


def expected(case, cfg, formula="stg"):
    pipe = case.build()
    ByHand(pipe, case, cfg, formula)
    return case.run(pipe, cfg)


def close(out, reference):
    size = reference.abs().max().item()
    torch.testing.assert_close(out, reference, atol=3e-5 * max(size, 1.0), rtol=0)


@named(VIDEO_PIPES)
def test_guided_pipeline_equals_the_reference(case):
    pipe = case.build()
    plain = case.run(pipe)
    branches = 1 if case.mode == "single" else 2
    with Stg([case.layer], scale=SCALE, tail="separate").apply(pipe, over_native=case.native) as applied:
        out = case.run(pipe)
    close(out, expected(case, True))
    assert not torch.allclose(out, plain, atol=1e-4), "the guidance did nothing"
    assert torch.equal(case.run(pipe), plain), "something is left on the pipeline"
    stats, n = applied.stats, len(find_blocks(pipe.transformer))
    steps = stats.blocks_plain // (branches * n)
    assert steps >= STEPS * case.runs and stats.blocks_naive == steps * (branches + 1) * n
    assert stats.blocks_run == steps * (branches * n + n - 1 - case.layer)


@named([case for case in VIDEO_PIPES if case.lone])
def test_without_cfg(case):
    pipe = case.build()
    with Stg([case.layer], scale=SCALE).apply(pipe, over_native=case.native):
        out = case.run(pipe, cfg=False)
    close(out, expected(case, False))


@named([BY_VIDEO[name] for name in FORMULAS if name in BY_VIDEO])
def test_the_formula_that_needs_the_scale(case):
    pipe = case.build()
    with Stg([case.layer], scale=SCALE, formula="wan").apply(pipe):
        out = case.run(pipe)
    close(out, expected(case, True, "wan"))


@named([BY_VIDEO[name] for name in ("wan_vace", "kandinsky6", "framepack", "ltx2_own") if name in BY_VIDEO])
def test_in_one_batch_with_the_others(case):
    """Hints, refined texts and sound go to the skipped rows as to those that they are variants of."""
    pipe = case.build()
    with Stg([case.layer, case.layer + 1], tail="separate").apply(pipe, over_native=case.native):
        alone = case.run(pipe)
    with Stg([case.layer, case.layer + 1], tail="batched").apply(pipe, over_native=case.native) as applied:
        close(case.run(pipe), alone)
    assert applied.stats.batched == STEPS * case.runs


@named([BY_VIDEO[name] for name in ("chronoedit", "skyreels_df")])
def test_differences_of_other_frames_are_not_used_again(case):
    """Where a step has other frames than the one before, every=2 cannot hold its differences."""
    pipe = case.build()
    with Stg([case.layer], scale=SCALE, every=2).apply(pipe):
        out = case.run(pipe)
    assert torch.isfinite(out).all()


# -- bad input --------------------------------------------------------------------------------------------------------


@named([case for case in VIDEO_PIPES if case.native])
def test_on_top_of_the_pipelines_own_it_is_refused_unless_asked_for(case):
    pipe = case.build()
    plain = case.run(pipe)
    off = native_off(pipe)
    told = ", ".join(f"{name}={value}" for name, value in off.items()) + ".*PrefixReuse.*over_native=True"
    with pytest.raises(SkipError, match=told), Stg([case.layer]).apply(pipe):
        case.run(pipe)
    with Stg([case.layer], scale=0).apply(pipe):  # which guides nothing
        assert torch.equal(case.run(pipe), plain)
    with Stg([case.layer]).apply(pipe) as applied:
        case.run(pipe, **off)  # the modality pass is no skip guidance
    assert applied.stats.passes > STEPS


def test_how_to_turn_the_pipelines_own_off_is_what_its_call_takes():
    own = {name: spec for name, spec in PIPELINES.items() if spec.native}
    assert len(own) == 8  # LTX-2 five times, Stable Diffusion 3 three times
    for name, spec in own.items():
        assert spec.native in spec.passive
        taken = inspect.signature(getattr(diffusers, name).__call__).parameters
        text_to_image_alone = name in ("StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline")
        assert text_to_image_alone or {argument for argument, _ in spec.native_off} <= set(taken)
    assert native_off(BY_VIDEO["ltx2"].build()) == {"stg_scale": 0.0, "audio_stg_scale": 0.0}
    assert native_off(object()) == {}


def test_a_rescale_that_would_look_at_the_guided_prediction_is_refused():
    case = BY_VIDEO["ltx2_rescaled"]
    pipe = case.build()
    with pytest.raises(SkipError, match="guidance_rescale=0"), Stg([1]).apply(pipe, over_native=True):
        case.run(pipe, cfg=False)
    with pytest.raises(SkipError, match="one is 1"), Stg([1]).apply(pipe, over_native=True):
        case.run(pipe, audio_guidance_scale=1.0)


def test_noise_levels_per_frame_are_no_timetable():
    from skipguide.schedule import Timetable

    case = BY_VIDEO["skyreels_df"]
    pipe = case.build()
    table = Timetable([(1.0, 1.0), (0.5, 2.0)], over="sigma")
    with pytest.raises(SkipError, match="noise levels"), Stg([case.layer], scale=table).apply(pipe):
        case.run(pipe)


def test_joined_predictions_come_apart_as_they_were():
    from skipguide.pipelines.sampling.concatenated_outputs import ConcatenatedOutputs

    family = MODELS["ltx2"]
    model, joined = family.build(), ConcatenatedOutputs()
    for form in (True, False):
        with torch.no_grad():
            stock = model(**family.inputs(2), return_dict=form)
            (one,) = joined.around(model)(**family.inputs(2), return_dict=form)
        again = joined.apart((one,))
        assert one.shape == (2, sum(joined.sizes)) and type(again) is type(stock)
        assert all(torch.equal(a, b) for a, b in zip(ByHand.parts(again), ByHand.parts(stock), strict=True))
