"""The unconditional pass on every k-th step only: in between u is c less the last difference c - u."""

import pytest
import torch
from helpers import guider_calls
from helpers.guider_calls import by_guider
from helpers.residue import no_gates, traces
from helpers.stg_reference import close

from skipguide import SkipError, find_blocks
from skipguide.pipelines import SkipGuider
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo import modular
from zoo.pipes import BY_PIPE, MODELS

STEPS = 4
BATCHED = ["ltx", "latte", "cogvideox_dynamic", "sd3"]
CALLS = ["wan", "hunyuan_true_cfg", "hunyuan15"]
cases = pytest.mark.parametrize("name", BATCHED + CALLS)
wan = guider_calls.wan


def run(case, pipe, **call):
    return case.run(pipe, 2, True, **{"num_inference_steps": STEPS} | call)


class ByHand:
    """The same by plain code, in place of the denoiser's forward.

    At the steps of `fresh` u is the model's, at others c - g with g the last c - u; both branches get s (c - k) more.
    """

    def __init__(self, pipe, case, fresh, s=0.0, layer=1):
        self.model = pipe.transformer
        self.weak = MODELS[case.family].identity_block(self.model, layer)
        self.fresh, self.s = fresh, s
        self.batched = case.cfg_modes[0] == "batched"
        self.calls, self.cond, self.gap = 0, None, None
        self.plain = self.model.forward
        self.model.forward = self

    def uncond(self, step, u, c):
        if step not in self.fresh:
            return c - self.gap
        self.gap = c - u
        return u

    def __call__(self, *args, **kwargs):
        out = self.plain(*args, **kwargs)
        if self.batched and len(out[0]) < 4:  # a skipped pass of somebody else's, for two prompts
            return out
        step, second = divmod(self.calls, 1 if self.batched else 2)
        self.calls += 1
        weak = self.weak(*args, **kwargs)[0] if self.s else out[0]
        if self.batched:
            (u, c), (_, k) = out[0].chunk(2), weak.chunk(2)
            delta = self.s * (c - k)
            return (torch.cat([self.uncond(step, u, c) + delta, c + delta]), *out[1:])
        if not second:
            self.cond, self.delta = out[0], self.s * (out[0] - weak)
            return (self.cond + self.delta, *out[1:])
        return (self.uncond(step, out[0], self.cond) + self.delta, *out[1:])


def by_hand(case, **how):
    pipe = case.build()
    ByHand(pipe, case, **how)
    return run(case, pipe)


@cases
def test_the_last_difference_in_place_of_a_pass(name):
    case = BY_PIPE[name]
    pipe = case.build()
    before, plain = traces(pipe.transformer), run(case, pipe)
    with Stg(scale=0, cfg_every=2).apply(pipe) as applied:
        out = run(case, pipe)
        assert torch.equal(run(case, pipe), out), "the second call begins anew"
    expected = by_hand(case, fresh={0, 2})
    close(out, expected)
    assert name in BATCHED or torch.equal(out, expected)
    assert not torch.allclose(out, plain, atol=1e-4)
    assert traces(pipe.transformer) == before and torch.equal(run(case, pipe), plain)
    n = len(find_blocks(pipe.transformer))
    stats = applied.stats
    assert stats.blocks_run == 2 * (2 * 2 + 2) * n and stats.blocks_plain == 2 * STEPS * 2 * n
    assert stats.passes == 2 * (STEPS if name in BATCHED else 2 * 2 + 2)
    assert stats.cfg_renewals == 2 and stats.cfg_reuse_error > 0
    assert "c - u used again" in str(stats)


@cases
def test_with_skip_guidance_and_its_cost(name):
    case = BY_PIPE[name]
    pipe = case.build()
    stg = Stg([1], scale=1.5, cfg_every=3)
    with stg.apply(pipe) as applied:
        out = run(case, pipe)
    close(out, by_hand(case, fresh={0, 3}, s=1.5))
    assert stg.cost(pipe, steps=STEPS).blocks_per_step * STEPS == applied.stats.blocks_run
    assert applied._pipe is None


@cases
def test_never_is_bit_equal_to_today(name):
    case = BY_PIPE[name]
    pipe = case.build()
    for settings in ({"scale": 0}, {"layers": [1]}):
        with Stg(**settings).apply(pipe):
            plain = run(case, pipe)
        with Stg(**settings, cfg_every=1).apply(pipe) as applied:
            assert torch.equal(run(case, pipe), plain)
        assert applied.stats.cfg_renewals == 0


def test_rescale_and_zero_star_work_on_the_difference_as_on_u():
    """Where the result is solved for, it is what the formula says of c and c - g."""
    case = BY_PIPE["ltx"]
    for settings in ({"rescale": 0.5}, {"zero_star": True}, {"guidance_scale": 4.0}):
        pipe = case.build()
        with Stg([1], cfg_every=2, **settings).apply(pipe) as applied:
            out = run(case, pipe)
        hand = case.build()
        ByHand(hand, case, fresh={0, 2})
        with Stg([1], **settings).apply(hand):
            close(out, run(case, hand))
        assert applied.stats.blocks_run < applied.stats.blocks_naive


def test_in_an_interval_it_begins_with_the_interval():
    case = BY_PIPE["wan"]
    pipe = case.build()
    n = len(find_blocks(pipe.transformer))
    with Stg(scale=0, cfg_interval=(0.25, 1.0), cfg_every=2).apply(pipe) as applied:
        run(case, pipe)
    assert applied.stats.blocks_run == (STEPS + 2) * n, "u at the steps 1 and 3"


def test_another_denoiser_begins_with_a_pass_of_its_own():
    case = BY_PIPE["wan22"]
    pipe = case.build()
    with Stg(scale=0, cfg_every=100).apply(pipe) as applied:
        run(case, pipe)
    n = len(find_blocks(pipe.transformer))
    assert applied.stats.blocks_run == (STEPS + 2) * n and applied.stats.cfg_renewals == 0


@pytest.mark.parametrize(
    "skip",
    [{"scale": 0.0}, {"scale": 0.0, "cfg_interval": (0.0, 0.5)}, {}, {"rescale": 0.5}],
    ids=["cfg alone", "cfg alone in an interval", "stg", "rescale"],
)
def test_the_guider_does_the_same(wan, skip):
    settings = {"layers": [1], "cfg_every": 2} | skip
    guider = SkipGuider(**settings, guidance_scale=5.0)
    assert SkipGuider.from_config(guider.config).settings.cfg_every == 2
    case = BY_PIPE["wan"]
    with Stg(**settings).apply(wan[1]) as applied:
        expected = case.run(wan[1], 2, True, guidance_scale=5.0, latents=modular.latents(2))
    close(by_guider(wan[0], guider), expected)
    if skip.get("scale") != 0.0:
        counted = ("passes", "blocks_run", "blocks_plain", "cfg_renewals")
        assert [getattr(guider.stats, name) for name in counted] == [getattr(applied.stats, name) for name in counted]
    no_gates(wan[0].transformer)


def test_an_error_leaves_nothing_to_reuse():
    case = BY_PIPE["wan"]
    pipe = case.build()

    def fail(*_):
        raise KeyboardInterrupt

    with Stg(scale=0, cfg_every=2).apply(pipe) as applied:
        with pytest.raises(KeyboardInterrupt):
            run(case, pipe, callback_on_step_end=fail)
        (interceptor,) = applied._parts
        out = run(case, pipe)
    assert interceptor.state.difference is None
    no_gates(pipe.transformer)
    close(out, by_hand(case, fresh={0, 2}))


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True, None])
def test_what_is_no_stride_is_refused(value):
    with pytest.raises(SkipError, match="cfg_every"):
        Stg([1], cfg_every=value)


@pytest.mark.parametrize("formula", ["uncond", "wan"])
def test_a_formula_that_needs_the_pass_is_refused(formula):
    with pytest.raises(SkipError, match="cfg_every=2"):
        Stg([1], formula=formula, cfg_every=2)


@pytest.mark.parametrize("name", ["ltx", "wan", "hunyuan"])
def test_without_cfg_it_is_refused(name):
    case = BY_PIPE[name]
    pipe = case.build()
    with pytest.raises(SkipError, match="turn CFG on"), Stg(scale=0, cfg_every=2).apply(pipe):
        case.run(pipe, cfg=False)


def test_a_cache_is_refused():
    from diffusers import FirstBlockCacheConfig

    pipe = BY_PIPE["wan"].build()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(SkipError, match="cfg_every leaves passes of the pipeline out"):
        Stg([1], cfg_every=2).apply(pipe)
