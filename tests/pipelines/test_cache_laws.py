"""The laws of guidance with a cache: caches of diffusers, on six families, under three ways to weaken a pass.

Each pair either works, and then both laws hold, or says why not; `helpers.cache_cases` is the table.
"""

import pytest
import torch
from helpers.cache_cases import CACHE_CASES, FAMILIES, LAYER, STEPS, TWO_CALLS, run
from helpers.cached_branches import ByHand
from helpers.stg_reference import close

from skipguide import SkipError
from skipguide.hosts.diffusers_caches import makes_uncond
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg

WAYS = {
    "stg": {},
    "uncond": {"formula": "uncond"},
    "attn_identity": {"part": "attn_identity"},
}
pairs = pytest.mark.parametrize(
    ("cache", "family"), [(cache, family) for cache in CACHE_CASES for family in FAMILIES], ids=str
)
ways = pytest.mark.parametrize("way", WAYS)
pytestmark = pytest.mark.filterwarnings("ignore:.*meshgrid.*")


def enabled(cache, family, how):
    """A pipeline with the cache on it."""
    pipe = FAMILIES[family].build()
    case = CACHE_CASES[cache]
    pipe.transformer.enable_cache(case.make(family, pipe, how, False))
    return pipe


def refused(cache, family, way):
    """What is to be raised for the pair, and its words; None where they work together."""
    words = CACHE_CASES[cache].absent.get(family, "")
    if words.startswith("cannot"):
        return ValueError, "not registered"
    if words.startswith("raises"):
        return SkipError, words.removeprefix("raises: ")
    if (cache, family, way) == ("FasterCache", "CogVideoX", "uncond"):
        return SkipError, "leaves blocks out in these very rows"
    return None


@pairs
@ways
def test_a_cache_that_never_answers_changes_nothing(cache, family, way):
    """Bit for bit; FasterCache's passes start from the beginning, so there it is the guidance that does the same."""
    if (error := refused(cache, family, way)) is not None:
        with pytest.raises(error[0], match=error[1]):
            Stg([LAYER], **WAYS[way]).apply(enabled(cache, family, "never"))
        return
    case, pipe = FAMILIES[family], enabled(cache, family, "never")
    whole = makes_uncond(pipe.transformer, cache)
    with Stg([LAYER], **WAYS[way]).apply(pipe) as applied:
        out = case.run(pipe)
    plain = case.build()
    with Stg([LAYER], prefix_reuse=not whole, **WAYS[way]).apply(plain) as without:
        assert torch.equal(case.run(plain), out)
    stats = applied.stats
    assert stats.blocks_cached == 0
    assert (stats.blocks_run, stats.blocks_skipped) == (without.stats.blocks_run, without.stats.blocks_skipped)


@pairs
@ways
def test_every_branch_has_a_cache_of_its_own(cache, family, way):
    """At a setting that answers: plain models with a cache each, called by hand, one per branch."""
    if refused(cache, family, way) is not None or CACHE_CASES[cache].absent.get(family):
        pytest.skip("they do not go together: see the law above")
    formula = WAYS[way].get("formula", "stg")
    if formula == "uncond" and family not in TWO_CALLS:
        pytest.skip("rows of one batch skip and others do not: see test_rows_that_skip_in_one_batch")
    case, settings = FAMILIES[family], CACHE_CASES[cache]
    reference = case.build()
    part = WAYS[way].get("part", "block")
    ByHand(
        reference,
        case,
        part,
        lambda model, alone: model.enable_cache(settings.make(family, reference, "hits", alone)),
        formula,
    )
    expected = run(case, reference)
    plain = case.build()
    with Stg([LAYER], **WAYS[way]).apply(plain) as without:
        assert not torch.allclose(run(case, plain), expected, atol=1e-4), "the cache never answered"
    pipe = enabled(cache, family, "hits")
    with Stg([LAYER], **WAYS[way]).apply(pipe) as applied:
        for _ in range(2):  # the states begin anew with every run
            close(run(case, pipe), expected)
    stats = applied.stats
    assert stats.blocks_run + stats.blocks_cached + stats.blocks_skipped == stats.blocks_naive
    assert bool(stats.blocks_cached) == settings.blocks
    assert stats.blocks_naive == 2 * without.stats.blocks_naive


@pytest.mark.parametrize("cache", ["FirstBlockCache", "MagCache", "TaylorSeerCache", "PyramidAttentionBroadcast"])
def test_rows_that_skip_in_one_batch(cache):
    """`formula="uncond"` with CFG in one call: the reference is a pipeline whose block runs for half of the rows."""
    case = FAMILIES["LTX"]
    reference = case.build()
    block = reference.transformer.transformer_blocks[LAYER]
    own = block.forward

    def second_half_only(hidden_states, **kwargs):
        half = len(hidden_states) // 2
        kwargs = {name: each[half:] if hasattr(each, "shape") else each for name, each in kwargs.items()}
        rotary = kwargs["image_rotary_emb"]
        kwargs["image_rotary_emb"] = tuple(each[half:] for each in rotary)
        return torch.cat([hidden_states[:half], own(hidden_states[half:], **kwargs)])

    def by_position(*args, **kwargs):
        names = ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb", "encoder_attention_mask")
        return second_half_only(**dict(zip(names, args, strict=False)), **kwargs)

    block.forward = by_position
    reference.transformer.enable_cache(CACHE_CASES[cache].make("LTX", reference, "hits", False))
    expected = run(case, reference)
    pipe = enabled(cache, "LTX", "hits")
    with Stg([LAYER], formula="uncond").apply(pipe) as applied:
        close(run(case, pipe), expected)
    assert bool(applied.stats.blocks_cached) == CACHE_CASES[cache].blocks


def states(model):
    """Every state that a cache of diffusers keeps in a model, by context where it has them."""
    found = []
    for module in model.modules():
        for hook in getattr(module.__dict__.get("_diffusers_hook"), "hooks", {}).values():
            for value in vars(hook).values():
                if type(value).__name__ == "StateManager":
                    found += list(value._state_cache)
            state = vars(hook).get("state")
            found += [] if getattr(state, "cache", None) is None else ["kept"]
    return found


WORKING = [
    ("FirstBlockCache", "Flux"),
    ("MagCache", "LTX"),
    ("SeaCache", "Wan"),
    ("TaylorSeerCache", "LTX-2"),
    ("PyramidAttentionBroadcast", "HunyuanVideo"),
    ("FasterCache", "CogVideoX"),
]


class BrokenOffError(Exception):
    pass


@pytest.mark.parametrize(("cache", "family"), WORKING)
def test_states_are_gone_after_a_failure_and_after_removal(cache, family):
    """A run that failed leaves nothing for the next one, and guidance nothing for the cache alone."""
    case, pipe = FAMILIES[family], enabled(cache, family, "hits")
    alone = run(case, pipe)
    with Stg([LAYER]).apply(pipe):
        expected = run(case, pipe)
    assert not states(pipe.transformer)
    assert torch.equal(run(case, pipe), alone)
    last, calls = pipe.transformer.proj_out, []

    def fail(*_):
        calls.append(1)
        if len(calls) == 2 * STEPS - 1:
            raise BrokenOffError

    def broken_off(*_):
        raise BrokenOffError

    with Stg([LAYER]).apply(pipe):
        hook = last.register_forward_hook(fail)  # in the middle of a pass
        with pytest.raises(BrokenOffError):
            run(case, pipe)
        hook.remove()
        assert not states(pipe.transformer)
        assert torch.equal(run(case, pipe), expected)
        with pytest.raises(BrokenOffError):  # where guidance does not see it
            case.run(pipe, num_inference_steps=STEPS, callback_on_step_end=broken_off)
        assert torch.equal(run(case, pipe), expected)
        with pytest.raises(BrokenOffError):
            case.run(pipe, num_inference_steps=STEPS, callback_on_step_end=broken_off)
    assert not states(pipe.transformer)
    assert torch.equal(run(case, pipe), alone)


@pytest.mark.parametrize("family", ["LTX", "Wan", "CogVideoX"])
def test_taylor_seer_that_hooked_nothing_is_an_error(family):
    """Its own identifiers match none of these models' attention, and it says nothing."""
    import diffusers

    pipe = FAMILIES[family].build()
    pipe.transformer.enable_cache(diffusers.TaylorSeerCacheConfig())
    with pytest.raises(SkipError, match=r"TaylorSeerCache enabled.*none of its hooks.*identifiers"):
        Stg([LAYER]).apply(pipe)


@pytest.mark.parametrize("cache", ["SeaCache", "FasterCache"])
def test_a_cache_of_the_whole_model_that_is_enabled_during(cache):
    """Its hook on the model would stand in front of guidance and see one pass where there are several."""
    family = "Wan" if cache == "SeaCache" else "CogVideoX"
    case, pipe = FAMILIES[family], enabled(cache, family, "hits")
    with Stg([LAYER]).apply(pipe):
        expected = run(case, pipe)
    late = case.build()
    with Stg([LAYER]).apply(late):
        run(case, late)
        late.transformer.enable_cache(CACHE_CASES[cache].make(family, late, "hits", False))
        assert torch.equal(run(case, late), expected)
    alone = run(case, enabled(cache, family, "hits"))
    assert torch.equal(run(case, late), alone)
    late.transformer.disable_cache()
    assert torch.equal(run(case, late), run(case, case.build()))


def test_a_skipped_pass_that_is_answered_costs_nothing():
    """FirstBlockCache decides by block 0, whose result the skipped pass has from the plain one: no block runs."""
    case, pipe = FAMILIES["LTX"], FAMILIES["LTX"].build()
    pipe.transformer.enable_cache(CACHE_CASES["MagCache"].make("LTX", pipe, "hits", False))
    with Stg([LAYER]).apply(pipe) as mag:
        run(case, pipe)
    pipe.transformer.disable_cache()
    blocks, answered = 4, 3  # of 8 steps: the first two and every second one after them are computed
    assert mag.stats.blocks_run == (STEPS - answered) * (2 * blocks + blocks - 1 - LAYER)
    assert mag.stats.blocks_cached == answered * (2 * blocks + blocks - 1)
