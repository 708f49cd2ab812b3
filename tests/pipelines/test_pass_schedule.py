"""Pass schedules: which passes run, which are made of earlier ones, and which blocks run, against a loop by hand."""

import copy

import pytest
import torch
from helpers import guider_calls
from helpers.guider_calls import by_guider
from helpers.residue import no_gates, traces
from helpers.stg_reference import close

from skipguide import SkipError, find_blocks
from skipguide.pipelines import PassSchedule, PassStep, SkipGuider
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo import modular
from zoo.pipes import BY_PIPE

LAYER, S = 1, 1.5
NAMES = ["ltx", "latte", "wan"]
wan = guider_calls.wan

PASSES = PassSchedule(
    [
        PassStep(skip="off"),
        PassStep(cfg="reused"),
        PassStep(cfg="off", skip="reused"),
        PassStep(skip="off"),
        PassStep(skip="reused"),
        PassStep(cfg="reused", skip="on"),
        PassStep(cfg="off", skip="off"),
    ]
)
BLOCKS = PassSchedule(
    [
        PassStep(left_out=[2]),
        PassStep(reused=[0, 3], cfg="reused"),
        PassStep(left_out=[0], reused=[3], skip="reused"),
        PassStep(reused=[3]),
        PassStep(left_out=[1, 2], reused=[0], skip="off"),
    ]
)
SCHEDULES = {"passes": PASSES, "blocks": BLOCKS}


def run(case, pipe, schedule, **call):
    return case.run(pipe, 2, True, num_inference_steps=len(schedule.steps), **call)


class ByHand:
    """A schedule by plain code: each prediction is a call of its own, and blocks are exchanged by hand."""

    def __init__(self, pipe, case, schedule, skips=True):
        self.model, self.schedule, self.skips = pipe.transformer, schedule, skips
        self.batched = case.cfg_modes[0] == "batched"
        self.calls, self.added, self.gap, self.direction, self.ran = 0, {}, None, None, 0
        for block in find_blocks(self.model):
            self.exchange(block.index, block.module)
        self.plain = self.model.forward
        self.model.forward = self

    def exchange(self, index, module):
        plain = module.forward

        def forward(*args, **kwargs):
            entered = args[0] if args else kwargs["hidden_states"]
            # up to the skipped layer, k has what c has
            branch = "cond" if self.branch == "skip" and index < LAYER else self.branch
            if self.branch == "skip" and index == LAYER:
                return entered
            if index in self.step.left_out:
                return entered
            if index in self.step.reused:
                return entered + self.added[branch, index]
            out = plain(*args, **kwargs)
            self.ran += self.branch != "skip" or index > LAYER
            self.added[branch, index] = out - entered
            return out

        module.forward = forward

    def predict(self, branch, args, kwargs, rows):
        self.branch = branch

        def own(value):
            return value[rows] if isinstance(value, torch.Tensor) and value.dim() and len(value) == self.size else value

        return self.plain(*map(own, args), **{name: own(value) for name, value in kwargs.items()})[0]

    def delta(self, c, args, kwargs, rows):
        if self.step.skip == "on" and self.skips:
            self.direction = c - self.predict("skip", args, kwargs, rows)
        return 0.0 if self.step.skip == "off" or not self.skips else S * self.direction

    def uncond(self, c, args, kwargs, rows):
        if self.step.cfg == "reused":
            return c - self.gap
        u = self.predict("uncond", args, kwargs, rows)
        self.gap = c - u
        return u

    def __call__(self, *args, **kwargs):
        self.size = len(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
        number, second = divmod(self.calls, 1 if self.batched else 2)
        self.calls += 1
        self.step = self.schedule.steps[number]
        everything = slice(0, self.size)
        first, last = (slice(0, self.size // 2), slice(self.size // 2, self.size)) if self.batched else [everything] * 2
        if not second:
            self.c = self.predict("cond", args, kwargs, last)
            self.y = self.c + self.delta(self.c, args, kwargs, last)
        if not self.batched and not second:
            return (self.y,)
        if self.step.cfg == "off":
            other = self.y
        else:
            other = self.uncond(self.c, args, kwargs, first) + (self.y - self.c)
        return (torch.cat([other, self.y]),) if self.batched else (other,)


@pytest.mark.parametrize("skips", [True, False], ids=["stg", "cfg alone"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", NAMES)
def test_equals_a_loop_by_hand(name, schedule, skips):
    case = BY_PIPE[name]
    pipe, hand = case.build(), case.build()
    reference = ByHand(hand, case, schedule, skips)
    expected = run(case, hand, schedule)
    before, plain = traces(pipe.transformer), run(case, pipe, schedule)
    stg = Stg([LAYER], scale=S if skips else 0)
    with stg.apply(pipe, schedule=schedule) as applied:
        out = run(case, pipe, schedule)
        (standing,) = applied._parts
        assert torch.equal(run(case, pipe, schedule), out), "the second call begins anew"
        assert standing.state.difference is None and not getattr(standing.passes.choices, "kept", None)
    close(out, expected)
    assert not torch.allclose(out, plain, atol=1e-4)
    assert applied.stats.blocks_run == 2 * reference.ran, "blocks that really ran"
    cost = Stg([LAYER], scale=S if skips else 0, schedule=schedule).cost(pipe)
    assert cost.blocks_per_step * len(schedule.steps) == pytest.approx(reference.ran)
    assert traces(pipe.transformer) == before and torch.equal(run(case, pipe, schedule), plain)


@pytest.mark.parametrize("name", NAMES)
def test_everything_on_is_bit_equal_to_no_schedule(name):
    case, whole = BY_PIPE[name], PassSchedule([PassStep()] * 3)
    pipe = case.build()
    with Stg([LAYER]).apply(pipe):
        expected = run(case, pipe, whole)
    with Stg([LAYER], schedule=whole).apply(pipe) as applied:
        assert torch.equal(run(case, pipe, whole), expected)
    n = len(find_blocks(pipe.transformer))
    assert applied.stats.blocks_run == 3 * (2 * n + n - 1 - LAYER)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_guider_does_the_same(wan, schedule):
    case, call = BY_PIPE["wan"], {"guidance_scale": 5.0, "latents": modular.latents(2)}
    steps = len(schedule.steps)
    with Stg([LAYER], schedule=schedule).apply(wan[1]) as applied:
        expected = run(case, wan[1], schedule, **call)
    guider = SkipGuider([LAYER], guidance_scale=5.0, schedule=schedule)
    again = SkipGuider.from_config(guider.config)
    assert again.settings.schedule == schedule
    for each in (guider, again, copy.deepcopy(again)):
        close(by_guider(wan[0], each, num_inference_steps=steps), expected)
        counted = ("passes", "blocks_run", "blocks_plain", "blocks_naive")
        assert [getattr(each.stats, name) for name in counted] == [getattr(applied.stats, name) for name in counted]
        no_gates(wan[0].transformer)


def test_blocks_alone_under_a_guider_without_skip_guidance(wan):
    schedule = PassSchedule([PassStep(), PassStep(reused=[0, 2], skip="off"), PassStep(left_out=[1], skip="off")])
    call = {"guidance_scale": 5.0, "latents": modular.latents(2)}
    with Stg(scale=0, schedule=schedule).apply(wan[1]) as applied:
        expected = run(BY_PIPE["wan"], wan[1], schedule, **call)
    guider = SkipGuider(scale=0.0, guidance_scale=5.0, schedule=schedule)
    close(by_guider(wan[0], guider, num_inference_steps=3), expected)
    assert guider.stats.blocks_run == applied.stats.blocks_run == 3 * 2 * 4 - 6


def test_an_interrupted_run_leaves_nothing_to_reuse():
    case, schedule = BY_PIPE["wan"], BLOCKS
    pipe = case.build()

    def fail(_, step, *__):
        if step == 1:
            raise KeyboardInterrupt
        return {}

    with Stg([LAYER], schedule=schedule).apply(pipe) as applied:
        (standing,) = applied._parts
        with pytest.raises(KeyboardInterrupt):
            run(case, pipe, schedule, callback_on_step_end=fail)
        out = run(case, pipe, schedule)
    with Stg([LAYER], schedule=schedule).apply(pipe):
        assert torch.equal(run(case, pipe, schedule), out)
    assert not standing.passes.choices.kept and standing.state.difference is None
    no_gates(pipe.transformer)


def test_round_trip_and_table(tmp_path):
    stg = Stg([LAYER], schedule=BLOCKS)
    stg.save_json(tmp_path / "stg.json")
    assert Stg.load_json(tmp_path / "stg.json") == stg and hash(BLOCKS) == hash(PassSchedule(list(BLOCKS.steps)))
    BLOCKS.save_json(tmp_path / "schedule.json")
    assert PassSchedule.load_json(tmp_path / "schedule.json") == BLOCKS
    assert "PassSchedule of 5 steps" in BLOCKS._repr_html_() and "<td>0, 3</td>" in BLOCKS._repr_html_()


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([], "1 to 10000 steps; got 0"),
        ("on", "list of PassStep"),
        (3, "list of PassStep"),
        ([PassStep(cfg="reused")], "step 0 reuses cfg"),
        ([PassStep(skip="off"), PassStep(skip="reused")], "step 1 reuses skip"),
        ([PassStep(reused=[1])], r"step 0 reuses the blocks \[1\], which ran in no cond pass"),
        ([PassStep(cfg="off"), PassStep(reused=[1])], r"which ran in no uncond pass"),
        ([PassStep(skip="off"), PassStep(reused=[1])], r"which ran in no skip pass"),
        ([PassStep(left_out=[1]), PassStep(reused=[1])], r"which ran in no cond pass"),
        ([{"version": 1, "cfg": "half"}], "one of on, reused, off; got 'half'"),
        ([{"version": 1, "skip": ["on"]}], "one of on, reused, off"),
        ([{"version": 1, "left_out": [True]}], "block numbers"),
        ([{"version": 1, "reused": [-1]}], "from 0 on"),
        ([{"version": 1, "left_out": [1, 1]}], "twice"),
        ([{"version": 1, "left_out": [1], "reused": [1]}], "both reused and left out"),
        ([{"version": 1, "blocks": [1]}], "unknown keys"),
        ([{"cfg": "on"}], "version"),
        ([3], "mapping"),
    ],
)
def test_schedules_that_mean_nothing(steps, words):
    with pytest.raises(SkipError, match=words):
        PassSchedule(steps)


@pytest.mark.parametrize(
    "settings",
    [
        *({"start": 0.2}, {"stop": 0.5}, {"every": 2}, {"cfg_interval": (0.2, 0.8)}, {"cfg_every": 2}),
        *({"tail": "batched"}, {"formula": "uncond"}, {"formula": "wan"}, {"formula": "segmented"}),
    ],
    ids=str,
)
def test_settings_that_say_the_same_are_refused(settings):
    with pytest.raises(SkipError, match="schedule"):
        Stg([1], schedule=BLOCKS, **settings)


def test_runs_that_do_not_fit_are_refused():
    case = BY_PIPE["wan"]
    pipe = case.build()
    schedule = PassSchedule([PassStep()] * 2)
    with Stg([LAYER], schedule=schedule).apply(pipe):
        with pytest.raises(SkipError, match="is for 2 steps, and the run has 4"):
            case.run(pipe, 2, True, num_inference_steps=4)
        with pytest.raises(SkipError, match="turn CFG on"):
            case.run(pipe, 2, False, num_inference_steps=2)
    with pytest.raises(SkipError, match="40"):
        Stg([LAYER], schedule=PassSchedule([PassStep(left_out=[40])])).apply(pipe)
    off = PassSchedule([PassStep(cfg="off", skip="off")] * 2)
    plain = case.run(pipe, 2, False, num_inference_steps=2)
    with Stg([LAYER], schedule=off).apply(pipe):
        assert torch.equal(case.run(pipe, 2, False, num_inference_steps=2), plain), "without CFG, nothing of it is off"
    no_gates(pipe.transformer)


def test_a_cache_and_ranks_are_refused():
    from diffusers import FirstBlockCacheConfig

    pipe = BY_PIPE["wan"].build()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(SkipError, match="schedule leaves passes of the pipeline out"):
        Stg([1], schedule=BLOCKS).apply(pipe)


def test_two_denoisers_keep_what_they_add_apart():
    """At the change of the denoiser nothing of the other one is used again: what was to be, runs."""
    case = BY_PIPE["wan22"]
    pipe = case.build()
    schedule = PassSchedule([PassStep(), *[PassStep(cfg="reused", skip="reused", reused=[0])] * 3])
    with Stg([LAYER], schedule=schedule).apply(pipe) as applied:
        run(case, pipe, schedule)
    n = len(find_blocks(pipe.transformer))
    whole = 2 * n + n - 1 - LAYER
    assert applied.stats.blocks_run == 2 * whole + 2 * (n - 1)
