"""Scales and layers that change with the step, stochastic sets, groups that share their beginning, projections."""

import random

import pytest
import torch
from helpers.stg_reference import close

from skipguide import SkipError, SkipPlan, Timetable, find_blocks
from skipguide.guidance import apg, zero_star_scale
from skipguide.pipelines import SkipGroup
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from skipguide.pipelines.sampling.shared_prefixes import share_prefixes, signature
from zoo.pipes import BY_PIPE, MODELS

STEPS = 4
CASES = pytest.mark.parametrize("name", ["ltx", "wan", "latte"])


def run(case, pipe, **call):
    return case.run(pipe, 2, True, num_inference_steps=STEPS, **call)


def by_hand(case, delta, factor=None):
    """The pipeline with delta(step, c, args, kwargs) added to both branches; `factor(u, c)` scales u first."""
    pipe = case.build()
    model, plain = pipe.transformer, pipe.transformer.forward
    state = {"calls": 0}

    def forward(*args, **kwargs):
        out = plain(*args, **kwargs)
        batched = case.cfg_modes[0] == "batched"
        step, second = divmod(state["calls"], 1 if batched else 2)
        state["calls"] += 1
        if batched:
            u, c = out[0].chunk(2)
            d = delta(step, c, lambda weak: weak(*args, **kwargs)[0].chunk(2)[1])
            u = factor(u, c) * u if factor else u
            return (torch.cat([u + d, c + d]), *out[1:])
        if not second:
            state["c"] = out[0]
            state["d"] = delta(step, out[0], lambda weak: weak(*args, **kwargs)[0])
            return (out[0] + state["d"], *out[1:])
        u = factor(out[0], state["c"]) * out[0] if factor else out[0]
        return (u + state["d"], *out[1:])

    model.forward = forward
    return run(case, pipe)


def without(case, *layers):
    model = case.build().transformer
    for layer in layers:
        model = MODELS[case.family].identity_block(model, layer)
    return model


def guided(case, stg):
    pipe = case.build()
    case.run(pipe, 1, True, num_inference_steps=1)  # diffusers itself leaves a registry on a model that was called
    before = [(name, sorted(m.__dict__)) for name, m in pipe.transformer.named_modules()]
    with stg.apply(pipe) as applied:
        out = run(case, pipe)
    assert [(name, sorted(m.__dict__)) for name, m in pipe.transformer.named_modules()] == before
    return out, applied


@CASES
def test_scale_over_the_steps(name):
    case = BY_PIPE[name]
    table = Timetable([(0.0, 0.0), (0.25, 2.0), (0.75, 0.5)])
    weak = without(case, 1)
    out, applied = guided(case, Stg([1], scale=table))
    scales = [0.0, 2.0, 2.0, 0.5]
    close(out, by_hand(case, lambda step, c, of: scales[step] * (c - of(weak))))
    n = len(find_blocks(weak))
    assert applied.stats.blocks_run == STEPS * 2 * n + 3 * (n - 2)  # at scale 0 there is no pass
    assert Stg([1], scale=table).cost(case.build(), steps=STEPS).blocks_per_step * STEPS == applied.stats.blocks_run


@CASES
def test_layers_over_the_steps(name):
    case = BY_PIPE[name]
    out, applied = guided(case, Stg(Timetable([(0.0, (1,)), (0.5, (2, 3))])))
    early, late = without(case, 1), without(case, 2, 3)
    close(out, by_hand(case, lambda step, c, of: c - of(early if step < 2 else late)))
    assert applied.layers == {"transformer": (1, 2, 3)}


def test_scale_over_sigma_takes_the_closest_higher_point():
    case = BY_PIPE["ltx"]
    pipe = case.build()
    run(case, pipe)
    sigmas = pipe.scheduler.sigmas.tolist()
    table = Timetable([(sigmas[1] + 1e-3, 1.0), (sigmas[2] + 1e-3, 3.0), (2.0, 0.5)], over="sigma")
    weak = without(case, 1)
    scales = [0.5, 1.0, 3.0, 3.0]
    out, _ = guided(case, Stg([1], scale=table))
    close(out, by_hand(case, lambda step, c, of: scales[step] * (c - of(weak))))
    with pytest.raises(SkipError, match="sigma"):
        Stg([1], scale=table).cost(pipe)


def test_sigma_of_schedulers_without_a_table_of_them():
    case = BY_PIPE["latte"]  # DDIM
    seen = []
    pipe = case.build()
    with Stg([1], scale=Timetable([(1e6, 1.0)], over="sigma")).apply(pipe) as applied:
        run_state = applied._parts[0].state
        handle = pipe.transformer.register_forward_hook(lambda *_: seen.append(run_state.sigma(pipe)))
        run(case, pipe)
        handle.remove()
    assert sorted(seen, reverse=True) == seen and seen[0] > seen[-1] >= 0


# -- stochastic -----------------------------------------------------------------------------------------------------


def draws(settings, blocks, group=0):
    pool = [i for i in range(1, blocks - 1) if not settings.prefer_cheap or i >= blocks // 2]
    count = max(1, round(settings.drop * blocks))
    return [sorted(random.Random(f"{settings.seed} {group} {step}").sample(pool, count)) for step in range(STEPS)]


@CASES
def test_stochastic_draws_a_new_set_at_every_step(name):
    case = BY_PIPE[name]
    stg = Stg("stochastic", drop=0.25, seed=3)
    n = len(find_blocks(case.build().transformer))
    sets = draws(stg, n)
    assert len({tuple(s) for s in sets}) > 1
    models = [without(case, *layers) for layers in sets]
    out, applied = guided(case, stg)
    close(out, by_hand(case, lambda step, c, of: c - of(models[step])))
    tails = sum(n - s[0] - len(s) for s in sets)
    assert applied.stats.blocks_run == STEPS * 2 * n + tails
    assert stg.cost(case.build(), steps=STEPS).blocks_per_step * STEPS == applied.stats.blocks_run
    again, _ = guided(case, stg)
    assert torch.equal(out, again)
    other, _ = guided(case, Stg("stochastic", drop=0.25, seed=4))
    assert not torch.equal(out, other)


def test_prefer_cheap_draws_from_the_deeper_half():
    case = BY_PIPE["wan"]
    pipe = case.build()
    pipe.transformer = type(pipe.transformer).from_config(dict(pipe.transformer.config) | {"num_layers": 20})
    deep, anywhere = (Stg("stochastic", prefer_cheap=cheap) for cheap in (True, False))
    with deep.apply(pipe) as applied:
        assert applied.layers["transformer"] == tuple(range(10, 19))
    with anywhere.apply(pipe) as applied:
        assert applied.layers["transformer"] == tuple(range(1, 19))
    assert deep.cost(pipe).ratio_to_plain < anywhere.cost(pipe).ratio_to_plain
    with pytest.raises(SkipError, match="to choose from"):
        Stg("stochastic", drop=0.96).apply(pipe)


# -- groups ---------------------------------------------------------------------------------------------------------


@CASES
def test_groups_add_up(name):
    case = BY_PIPE[name]
    groups = [SkipGroup([1, 2], 0.5), SkipGroup([1, 3], 2.0), SkipGroup([2], -1.0, part="attn")]
    a, b = without(case, 1, 2), without(case, 1, 3)
    third = MODELS[case.family].zeroed(case.build().transformer, 2, "attn")
    out, applied = guided(case, Stg(groups=groups))
    close(out, by_hand(case, lambda step, c, of: 0.5 * (c - of(a)) + 2.0 * (c - of(b)) - (c - of(third))))
    n = len(find_blocks(a))
    # from the plain pass at 1; from the first group at 2, where it is still without 1; from the plain pass at 2
    own = (n - 1 - 2) + (n - 2 - 1) + (n - 2)
    assert applied.stats.blocks_run == STEPS * (2 * n + own)
    full, naive = guided(case, Stg(groups=groups, prefix_reuse=False))
    close(out, full)
    assert naive.stats.blocks_run == STEPS * (2 * n + 3 * n - 4)


def test_route_takes_the_longest_shared_beginning():
    plans = [SkipPlan([4, 8]), SkipPlan([4, 9]), SkipPlan([6]), SkipPlan([4, 9, 10], part="attn"), SkipPlan([4, 8, 11])]
    legs = share_prefixes(plans, 14)
    assert [(leg.parent, leg.start) for leg in legs] == [(-1, 4), (0, 8), (-1, 6), (-1, 4), (0, 11)]
    assert [leg.blocks for leg in legs] == [8, 5, 7, 10, 2]
    assert [leg.plan.layers for leg in legs] == [(4, 8), (9,), (6,), (4, 9, 10), (11,)]
    assert [leg.start for leg in share_prefixes(plans, 14, reuse=False)] == [None] * 5
    found = signature(SkipPlan([1]) | SkipPlan([1, 2], part="mlp"))
    assert {layer: {each.part for each in own} for layer, own in found.items()} == {1: {"block", "mlp"}, 2: {"mlp"}}


def test_any_route_costs_the_edges_of_the_tree():
    """Whatever the order of the plans, what runs is the same."""
    rng = random.Random(0)
    for _ in range(50):
        sets = {tuple(sorted(rng.sample(range(12), rng.randint(1, 3)))) for _ in range(4)}
        costs = {
            sum(leg.blocks for leg in share_prefixes([SkipPlan(s) for s in rng.sample(sorted(sets), len(sets))], 12))
        }
        costs |= {sum(leg.blocks for leg in share_prefixes([SkipPlan(s) for s in sorted(sets)], 12))}
        assert len(costs) == 1


def test_spatial_and_temporal_stacks_with_scales_of_their_own():
    case = BY_PIPE["latte"]
    groups = [
        SkipGroup([1], 2.0, stack="transformer_blocks"),
        SkipGroup([0], 0.5, stack="temporal_transformer_blocks"),
    ]
    out, applied = guided(case, Stg(groups=groups))
    space, time = without(case, 2), without(case, 1)
    close(out, by_hand(case, lambda step, c, of: 2.0 * (c - of(space)) + 0.5 * (c - of(time))))
    assert applied.layers == {"transformer": (1, 2)}
    one, _ = guided(case, Stg([1], stack="temporal_transformer_blocks"))
    same, _ = guided(case, Stg([3]))
    assert torch.equal(one, same)
    with pytest.raises(SkipError, match="no stack"):
        Stg([1], stack="blocks").apply(case.build())


# -- projections and every --------------------------------------------------------------------------------------------


@CASES
def test_apg_on_the_skip_direction(name):
    case = BY_PIPE[name]
    weak = without(case, 1)
    out, _ = guided(case, Stg([1], scale=2.0, apg=0.25, apg_norm=3.0))
    close(out, by_hand(case, lambda step, c, of: 2.0 * apg(c - of(weak), c, 0.25, 3.0)))


@CASES
def test_zero_star_with_and_without_skip_guidance(name):
    case = BY_PIPE[name]
    weak = without(case, 1)
    out, _ = guided(case, Stg([1], zero_star=True))
    close(out, by_hand(case, lambda step, c, of: c - of(weak), zero_star_scale))
    alone, applied = guided(case, Stg(scale=0, zero_star=True))
    close(alone, by_hand(case, lambda step, c, of: 0.0, zero_star_scale))
    assert applied.stats.blocks_run == applied.stats.blocks_plain


@CASES
def test_every_reuses_the_last_difference_and_reports_what_it_cost_in_accuracy(name):
    case = BY_PIPE[name]
    weak = without(case, 1)
    kept = []

    def delta(step, c, of):
        kept.append(c - of(weak) if step % 2 == 0 else kept[-1])
        return kept[-1]

    out, applied = guided(case, Stg([1], every=2))
    close(out, by_hand(case, delta))
    # with CFG in one batch rows 0 and 1 are two prompts, which one norm covers
    expected = ((kept[0] - kept[2]).norm() / kept[2].norm()).item()
    plain = STEPS * (1 if case.cfg_modes[0] == "batched" else 2)
    assert applied.stats.passes == plain + STEPS // 2 and applied.stats.renewals == 1
    assert applied.stats.reuse_error == pytest.approx(expected, rel=1e-3)
    _, fresh = guided(case, Stg([1]))
    assert fresh.stats.reuse_error is None and "off when renewed" not in str(fresh.stats)
    assert "off when renewed" in str(applied.stats)


# -- data -------------------------------------------------------------------------------------------------------------


def test_settings_with_tables_and_groups_round_trip(tmp_path):
    stg = Stg(
        Timetable([(0.0, (1, 2)), (0.5, (3,))]),
        scale=Timetable([(1.0, 0), (0.9, 4.0)], over="sigma", between="linear"),
        cfg_interval=(0.1, 0.9),
        apg=0.0,
    )
    stg.save_json(tmp_path / "stg.json")
    assert Stg.load_json(tmp_path / "stg.json") == stg
    grouped = Stg(groups=[SkipGroup([1], Timetable([(0.0, 1.0)]), stack="blocks"), SkipGroup("stochastic")])
    grouped.save_json(tmp_path / "groups.json")
    assert Stg.load_json(tmp_path / "groups.json") == grouped


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers": "best"}, "auto, stochastic"),
        ({"layers": [1], "scale": Timetable([(0.0, (1,))])}, "finite number"),
        ({"layers": [1], "groups": [SkipGroup([1])]}, "given in the groups"),
        ({"groups": []}, "at least one group"),
        ({"layers": [1], "apg_norm": 0.0}, "positive"),
        ({"layers": [1], "drop": 1.0}, "share"),
        ({"layers": [1], "formula": "uncond", "apg": 0.0}, "no third pass"),
        ({"layers": [1], "formula": "wan", "apg": 0.0}, "projects on c"),
        ({"layers": "auto", "score": "luck"}, "unknown score"),
    ],
)
def test_settings_that_mean_nothing(settings, words):
    with pytest.raises(SkipError, match=words):
        Stg(**settings)


@pytest.mark.parametrize(
    ("points", "how", "words"),
    [
        ([], {}, "at least one"),
        ([(0.5, 1.0), (0.5, 2.0)], {}, "twice"),
        ([(1.5, 1.0)], {}, "fractions"),
        ([(0.0, 1.0), (0.5, (1,))], {}, "all finite numbers"),
        ([(0.0, (1,))], {"between": "linear"}, "linear"),
        ([(0.0, float("nan"))], {}, "all finite numbers"),
        ([1.0], {}, "pairs"),
        ([(0.0, 1.0)], {"over": "time"}, "expected over"),
    ],
)
def test_tables_that_mean_nothing(points, how, words):
    with pytest.raises(SkipError, match=words):
        Timetable(points, **how)


def test_linear_tables():
    table = Timetable([(0.5, 0.0), (0.0, 1.0)], between="linear")
    assert [table.at(x) for x in (0.0, 0.25, 0.5, 0.9)] == [1.0, 0.5, 0.0, 0.0]
    falling = Timetable([(1.0, 0.0), (0.5, 2.0)], over="sigma", between="linear")
    assert [falling.at(0.0, s) for s in (1.2, 1.0, 0.75, 0.1)] == [0.0, 0.0, 1.0, 2.0]


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@CASES
def test_groups_and_segments_on_cuda(name):
    case = BY_PIPE[name]
    groups = [SkipGroup([1, 2], 0.5), SkipGroup([1, 3], Timetable([(0.0, 2.0), (0.5, 1.0)]))]
    found = []
    for reuse in (True, False):
        pipe = case.build().to("cuda")
        with Stg(groups=groups, formula="segmented", apg=0.0, prefix_reuse=reuse).apply(pipe) as applied:
            found.append(run(case, pipe))
        assert applied.stats.blocks_run < applied.stats.blocks_naive or not reuse
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)
