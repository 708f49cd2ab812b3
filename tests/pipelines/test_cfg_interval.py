"""CFG in a part of the steps only: elsewhere the unconditional branch is not computed, and any CFG yields c."""

import pytest
import torch
from helpers.stg_reference import close

from skipguide import SkipError, find_blocks
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.pipes import BY_PIPE, MODELS

STEPS = 4
BATCHED = ["ltx", "latte", "cogvideox_dynamic", "sd3"]
CALLS = ["wan", "hunyuan_true_cfg", "hunyuan15"]
cases = pytest.mark.parametrize("name", BATCHED + CALLS)


def run(case, pipe, **call):
    return case.run(pipe, 2, True, num_inference_steps=STEPS, **call)


class ByHand:
    """The same by plain code: which steps have CFG, and which add s (c - k) from a model without the layer."""

    def __init__(self, pipe, case, cfg, skip=(), s=1.0, layer=1):
        self.model = pipe.transformer
        self.weak = MODELS[case.family].identity_block(self.model, layer)
        self.cfg, self.skip, self.s = cfg, skip, s
        self.batched = case.cfg_modes[0] == "batched"
        self.calls, self.cond = 0, None
        self.plain = self.model.forward
        self.model.forward = self

    def guided(self, step, c, weak):
        return c + (self.s * (c - weak) if step in self.skip else 0)

    def __call__(self, *args, **kwargs):
        out, weak = self.plain(*args, **kwargs), self.weak(*args, **kwargs)
        step, second = divmod(self.calls, 1 if self.batched else 2)
        self.calls += 1
        if self.batched:
            (u, c), (_, k) = out[0].chunk(2), weak[0].chunk(2)
            y = self.guided(step, c, k)
            return (torch.cat([u + y - c if step in self.cfg else y, y]), *out[1:])
        if not second:
            c = out[0]
            self.cond = self.guided(step, c, weak[0])
            self.moved = self.cond - c
            return (self.cond, *out[1:])
        return (out[0] + self.moved if step in self.cfg else self.cond, *out[1:])


def by_hand(case, **how):
    pipe = case.build()
    ByHand(pipe, case, **how)
    return run(case, pipe)


@cases
def test_cfg_in_an_interval_and_nothing_else(name):
    case = BY_PIPE[name]
    pipe = case.build()
    plain = run(case, pipe)
    with Stg(scale=0, cfg_interval=(0.25, 0.75)).apply(pipe) as applied:
        out = run(case, pipe)
    close(out, by_hand(case, cfg={1, 2}))
    assert not torch.allclose(out, plain, atol=1e-4)
    assert torch.equal(run(case, pipe), plain), "something is left on the pipeline"
    n = len(find_blocks(pipe.transformer))
    assert applied.stats.blocks_run == (2 + 2 * 2) * n and applied.stats.blocks_plain == STEPS * 2 * n
    assert applied.stats.passes == (STEPS if name in BATCHED else 2 + 2 * 2)


@cases
def test_segmented_has_one_or_the_other(name):
    case = BY_PIPE[name]
    pipe = case.build()
    stg = Stg([1], scale=1.5, formula="segmented")
    assert stg.cfg_interval == (0.0, 0.5)
    with stg.apply(pipe) as applied:
        out = run(case, pipe)
    close(out, by_hand(case, cfg={0, 1}, skip={2, 3}, s=1.5))
    n = len(find_blocks(pipe.transformer))
    assert applied.stats.blocks_run == 2 * 2 * n + 2 * (n + n - 2)
    assert stg.cost(pipe, steps=STEPS).blocks_per_step * STEPS == applied.stats.blocks_run


def test_the_frugal_preset_costs_less_than_plain_cfg():
    stg = Stg.preset("frugal", layers=[19])
    assert stg == Stg([19], cfg_interval=(0.2, 0.8))
    assert Stg.preset("frugal").layers is None, "the model's own"
    assert Stg.preset("frugal", scale=0.0).cfg_interval == (0.2, 0.8)
    with pytest.raises(SkipError, match="unknown preset 'lavish'; expected one of 'frugal'"):
        Stg.preset("lavish")
    pipe = BY_PIPE["latte"].build()
    n = len(find_blocks(pipe.transformer))
    cost = Stg.preset("frugal", layers=[n - 1]).cost(pipe)
    assert cost.blocks_per_step < 2 * n


@pytest.mark.parametrize("name", ["ltx", "wan"])
def test_skip_guidance_goes_on_outside_the_interval(name):
    case = BY_PIPE[name]
    pipe = case.build()
    with Stg([1], cfg_interval=(0.5, 1.0), start=0.25).apply(pipe):
        out = run(case, pipe)
    close(out, by_hand(case, cfg={2, 3}, skip={1, 2, 3}))


@cases
def test_a_whole_interval_is_plain_cfg(name):
    case = BY_PIPE[name]
    pipe = case.build()
    plain = run(case, pipe)
    with Stg(scale=0, cfg_interval=(0.0, 1.0)).apply(pipe) as applied:
        assert torch.equal(run(case, pipe), plain)
    assert applied.stats.blocks_run == applied.stats.blocks_plain


def test_the_uncond_formula_in_an_interval():
    case = BY_PIPE["wan"]
    pipe = case.build()
    n = len(find_blocks(pipe.transformer))
    with Stg([1], formula="uncond", cfg_interval=(0.0, 0.5)).apply(pipe) as applied:
        run(case, pipe)
    assert applied.stats.blocks_run == 2 * (n + n - 1) + 2 * n


@pytest.mark.parametrize("name", ["ltx", "wan"])
def test_the_next_pass_holds_no_activation(name):
    """Plain passes outside the window and unconditional calls capture nothing."""
    case = BY_PIPE[name]
    pipe = case.build()
    with Stg([1], stop=0.5).apply(pipe) as applied:
        (interceptor,) = applied._parts
        held = []
        block = find_blocks(pipe.transformer)[2].module
        handle = block.register_forward_hook(
            lambda *_: held.append(
                sum(bool(p.streams) for path in interceptor.passes._prepared.values() for p in path.captured.values())
            )
        )
        run(case, pipe)
        handle.remove()
        run_state = interceptor.state
        assert run_state.cond is None or name != "wan"
        assert run_state.delta is None and run_state.directions is None
    # two steps with a plain and a skipped pass, then plain ones; Wan's unconditional calls in between
    assert held == ([1, 1] * 2 + [0] * 2 if name == "ltx" else [1, 1, 0] * 2 + [0] * 4)


@pytest.mark.parametrize(
    "settings",
    [{"cfg_interval": (0.0, 0.5), "scale": 0}, {"formula": "segmented"}, {"zero_star": True}],
    ids=["interval", "segmented", "zero_star"],
)
@pytest.mark.parametrize("name", ["ltx", "wan", "hunyuan"])
def test_without_cfg_it_is_refused(settings, name):
    case = BY_PIPE[name]
    pipe = case.build()
    with pytest.raises(SkipError, match="turn CFG on"), Stg(**{"layers": [1]} | settings).apply(pipe):
        case.run(pipe, cfg=False)


@pytest.mark.parametrize("interval", [(0.5, 0.5), (-0.1, 0.5), (0.0, 1.1), (0.2,), "ab", (float("nan"), 1.0)])
def test_intervals_that_mean_nothing(interval):
    with pytest.raises((SkipError, ValueError)):
        Stg([1], cfg_interval=interval)


def test_segmented_needs_a_step_without_cfg():
    with pytest.raises(SkipError, match="no step"):
        Stg([1], formula="segmented", cfg_interval=(0.0, 1.0))
