"""Tune: the search for a schedule on tiny random models, its moves, and what it refuses."""

import math

import pytest
import torch
from helpers.residue import no_gates, traces

from skipguide import SkipError
from skipguide.pipelines import PassSchedule, PassStep, TunedSchedule, tune
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from skipguide.pipelines.tuning.moves import Move, StillBlock, all_moves, alone
from skipguide.pipelines.tuning.trajectories import Trajectories
from skipguide.pipelines.tuning.tune import beginning
from zoo.pipes import BY_PIPE

STEPS = 3
ORDER = [StillBlock(2, "reused", 0.1), StillBlock(0, "left_out", 0.2)]


class Tuned:
    """A pipeline of the zoo, with the arguments that its case calls it with."""

    def __init__(self, name, cfg=True):
        case = BY_PIPE[name]
        self.pipe = case.build()
        caught = {}

        class Caught(type(self.pipe)):
            def __call__(self, *args, **kwargs):
                caught.update(kwargs)
                raise StopIteration

        kind = type(self.pipe)
        self.pipe.__class__ = Caught
        with pytest.raises(StopIteration):
            case.run(self.pipe, 1, cfg, num_inference_steps=STEPS)
        self.pipe.__class__ = kind
        self.call = {name: value for name, value in caught.items() if name not in ("generator", "output_type")}

    def calls(self, count=1, **more):
        return [{"output_type": "latent"} | self.call | {"seed": seed} | more for seed in range(count)]

    def run(self):
        """The first of the calls, by hand."""
        call = {name: value for name, value in self.calls()[0].items() if name != "seed"}
        return self.pipe(generator=torch.Generator().manual_seed(0), **call)[0]


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_a_budget_is_kept_and_counted(name):
    on = Tuned(name)
    before = traces(on.pipe.transformer)
    tuned = tune(on.pipe, on.calls(2), 0.6, guidance=Stg([1]))
    assert isinstance(tuned, TunedSchedule) and tuned.share <= 0.6
    assert traces(on.pipe.transformer) == before
    ran = []
    for schedule in (None, tuned.schedule):
        with Stg([1]).apply(on.pipe, schedule=schedule) as applied:
            on.run()
        ran.append(applied.stats.blocks_run)
    assert ran[1] / ran[0] == pytest.approx(tuned.share), "the foretold blocks are those that run"
    shares = [each.share for each in tuned.path]
    assert shares[0] == 1 and shares == sorted(shares, reverse=True) and tuned.path[0].damage == 0
    assert tuned.error == math.sqrt(tuned.path[-1].damage) > 0
    assert tuned.within(0.8).share <= 0.8
    with pytest.raises(SkipError, match="no schedule on the way"):
        tuned.within(0.01)
    assert "of the blocks run" in repr(tuned)


def test_the_damage_is_that_of_the_final_latents():
    on = Tuned("wan")
    tuned = tune(on.pipe, on.calls(), 0.7, guidance=Stg([1]), blocks=False)
    assert not tuned.schedule.blocks and not tuned.order
    ends = []
    for schedule in (None, tuned.schedule):
        with Stg([1]).apply(on.pipe, schedule=schedule):
            ends.append(on.run())
    apart = (ends[1] - ends[0]).square().sum() / ends[0].square().sum()
    assert tuned.path[-1].damage == pytest.approx(float(apart), rel=1e-4)


def test_the_first_change_is_the_cheapest_of_all():
    """Every single change tried by hand: the first one on the way has the least damage per block."""
    on = Tuned("wan")
    guidance = Stg([1])
    tuned = tune(on.pipe, on.calls(), 0.9, guidance=guidance, blocks=False)
    start = tuned.path[0].schedule
    with guidance.apply(on.pipe):
        whole = on.run()
    ratios = []
    for move in all_moves(STEPS):
        if (changed := move.made(start, (), 1)) is None:
            continue
        with guidance.apply(on.pipe, schedule=changed) as applied:
            end = on.run()
        saved = guidance.scheduled(start).cost(on.pipe).blocks_per_step * STEPS - applied.stats.blocks_run
        ratios.append((float((end - whole).square().sum() / whole.square().sum()) / saved, changed))
    assert tuned.path[1].schedule == min(ratios, key=lambda each: each[0])[1]


def test_without_cfg_and_without_skip_guidance():
    on = Tuned("wan", cfg=False)
    tuned = tune(on.pipe, on.calls(), 0.7, guidance=Stg(scale=0))
    assert all(step.cfg == step.skip == "off" for step in tuned.schedule.steps) and tuned.share <= 0.7


def test_windows_are_where_the_search_begins():
    stg = Stg([1], start=0.25, every=2, cfg_interval=(0.0, 0.5), cfg_every=2)
    found = beginning(stg, 4, True)
    assert found == PassSchedule(
        [
            PassStep(cfg="on", skip="off"),
            PassStep(cfg="reused", skip="on"),
            PassStep(cfg="off", skip="reused"),
            PassStep(cfg="off", skip="on"),
        ]
    )
    assert stg.scheduled(found).schedule == found and stg.scheduled(found).cfg_interval is None
    assert {step.cfg for step in beginning(stg, 4, False).steps} == {"off"}
    assert {step.skip for step in beginning(Stg(scale=0), 4, True).steps} == {"off"}


def test_moves():
    start = PassSchedule([PassStep(), PassStep(cfg="reused"), PassStep()])
    assert Move(0, "cfg", "off").made(start, ORDER, 1) is None, "the next step has nothing to use again then"
    assert Move(1, "cfg", "reused").made(start, ORDER, 1) is None
    assert Move(1, "cfg").made(start, ORDER, 1).steps[1] == PassStep(cfg="off")
    assert Move(2, "skip", "reused").made(start, ORDER, 1).steps[2].skip == "reused"
    assert Move(2, "blocks").made(start, ORDER, 1).steps[2].reused == (2,)
    both = Move(2, "blocks").made(start, ORDER, 2)
    assert (both.steps[2].reused, both.steps[2].left_out) == ((2,), (0,))
    assert Move(2, "blocks").made(both, ORDER, 2) is None
    assert Move(0, "blocks").made(start, ORDER, 1) is None, "nothing ran before the first step"
    assert alone(start, 1, "left_out").steps[1].left_out == (1,)
    assert alone(start, 1, "left_out").steps[2].left_out == ()
    late = PassSchedule([PassStep(cfg="off"), PassStep(), PassStep(), PassStep()])
    assert [step.reused for step in alone(late, 1, "reused").steps] == [(), (), (), (1,)], "u runs first at step 1"
    assert alone(PassSchedule([PassStep()]), 1, "reused") is None


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        ([], "list of arguments"),
        ({"prompt": "a"}, "list of arguments"),
        ("a tram", "list of arguments"),
        ([3], "list of arguments"),
        ([{"generator": torch.Generator()}], "seed="),
        ([{"seed": 1.5}], "seed as a whole number"),
    ],
)
def test_calls_that_cannot_be_repeated_are_refused(calls, words):
    pipe = BY_PIPE["wan"].build()
    with pytest.raises(SkipError, match=words):
        tune(pipe, calls, guidance=Stg([1]))
    no_gates(pipe.transformer)


@pytest.mark.parametrize("budget", [0, 0.05, 1.1, "half", float("nan"), True])
def test_budgets_that_mean_nothing(budget):
    with pytest.raises(SkipError, match="budget"):
        tune(BY_PIPE["wan"].build(), [{"prompt": "a"}], budget, guidance=Stg([1]))


def test_what_cannot_have_a_schedule_is_refused_before_the_first_run():
    pipe = BY_PIPE["wan"].build()
    pipe.transformer.forward = None  # it is not called
    for formula in ("uncond", "segmented", "wan"):
        with pytest.raises(SkipError, match="schedule"):
            tune(pipe, [{"prompt": "a"}], guidance=Stg([1], formula=formula))


def test_an_interrupt_leaves_nothing():
    on = Tuned("wan")
    before, seen = traces(on.pipe.transformer), []

    def fail(*_):
        seen.append(1)
        if len(seen) == 10:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        tune(on.pipe, on.calls(callback_on_step_end=fail), guidance=Stg([1]))
    assert traces(on.pipe.transformer) == before


def test_pictures_in_place_of_latents_are_refused():
    on = Tuned("wan")

    class Pictures(type(on.pipe)):
        def __call__(self, *args, **kwargs):
            return ([super().__call__(*args, **kwargs)],)

    on.pipe.__class__ = Pictures
    with pytest.raises(SkipError, match="output_type"):
        tune(on.pipe, on.calls(), guidance=Stg([1]))


def test_a_skip_that_no_pass_shows_any_more_is_never_taken():
    """Where the skipped block stands still in the plain pass too, c and k are the same: that is no saving."""
    on = Tuned("wan")
    runs = Trajectories(on.pipe, on.calls(), Stg([1]))
    assert runs.damage(PassSchedule([PassStep(left_out=[1])] * STEPS)) == math.inf
    assert runs.damage(PassSchedule([PassStep()] * STEPS)) == 0 and runs.cfg and runs.steps == STEPS
