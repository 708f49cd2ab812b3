"""What `generate` does under a plan: which passes read a prompt, which decode, and what is refused where it begins."""

import logging

import pytest
import torch
from helpers import llm_zoo
from helpers.llm_zoo import CACHE
from transformers import DynamicCache

from skipguide import SkipError
from skipguide.llm import AdaSkip, SelfSpeculative, SublayerPlan, UnifiedSkip, watch

LLAMA = llm_zoo.BY_NAME["llama"]
IDS = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]])  # repeats itself, so that prompt lookup finds drafts
GREEDY = {"max_new_tokens": 24, "do_sample": False}
PLANS = {phase: SublayerPlan(attn=[0], mlp=[1, 2], phase=phase) for phase in ("decode", "prefill", "both")}
WAYS = {
    "prompt lookup": lambda: {"prompt_lookup_num_tokens": 4},
    "early exit": lambda: {"assistant_early_exit": 2},
    "assistant": lambda: {"assistant_model": LLAMA.build()},
    "chunks, the last of one token": lambda: {"prefill_chunk_size": 4},
    "chunks": lambda: {"prefill_chunk_size": 5},
    "static": lambda: {"cache_implementation": "static"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_text_is_the_plans_whoever_drafts_and_however_a_prompt_is_cut(plan, way):
    model = LLAMA.build()
    whole = model.generate(IDS, **GREEDY)
    with plan.apply(model) as applied:
        expected, passes = model.generate(IDS, **GREEDY), applied.stats.passes
    with plan.apply(model) as applied:
        got = model.generate(IDS, **GREEDY, **WAYS[way]())
    assert torch.equal(got, expected) and not torch.equal(got, whole)
    if way == "prompt lookup":
        assert applied.stats.passes < passes == 24, "several tokens were verified at once"
    assert "get_candidates" not in vars(model) and not {"_get_candidate_generator"} & set(vars(model))


@pytest.mark.parametrize("sample", [False, True])
def test_what_decode_leaves_out_does_not_depend_on_who_drafts(sample):
    """Every pass but the prompt's leaves 3 of 8 sublayers out."""
    model = LLAMA.build()
    torch.manual_seed(0)
    with PLANS["decode"].apply(model) as applied:
        model.generate(IDS, max_new_tokens=16, do_sample=sample, prompt_lookup_num_tokens=4)
    stats = applied.stats
    assert stats.skips["model.layers.1.mlp"] == stats.passes - 1
    assert stats.skipped_fraction == pytest.approx((stats.passes - 1) / stats.passes * 3 / 8)


def test_an_assistant_that_leaves_out_reads_the_prompt_whole_and_decodes_after():
    """What it is given between two drafts are tokens that were decoded, by a `generate` of its own."""
    model, assistant = LLAMA.build(), LLAMA.build(seed=1)
    expected = model.generate(IDS, **GREEDY)
    with PLANS["decode"].apply(assistant) as applied:
        assert torch.equal(model.generate(IDS, **GREEDY, assistant_model=assistant), expected)
    stats = applied.stats
    assert stats.passes > 10 and stats.skips["model.layers.1.mlp"] == stats.passes - 1


def test_passes_by_hand_are_refused_until_it_is_said_what_they_are():
    model = LLAMA.build()
    zeroed = LLAMA.zeroed(model, [], [1, 2])
    plan = SublayerPlan(mlp=[1, 2], phase="decode")

    def after_the_prompt(model, *chunks):
        cache = DynamicCache(config=model.config)
        return torch.cat([model(chunk, **{CACHE: cache}).logits for chunk in chunks], 1)

    whole = after_the_prompt(model, IDS[:, :8], IDS[:, 8:])
    cache = DynamicCache(config=model.config)
    model(IDS[:, :8], **{CACHE: cache})
    left_out = zeroed(IDS[:, 8:], **{CACHE: cache}).logits
    with plan.apply(model) as applied:
        with pytest.raises(SkipError, match=r"this pass of 5 tokens .*applied\.in_phase\('prefill'\)"):
            after_the_prompt(model, IDS[:, :8], IDS[:, 8:])
        with applied.in_phase("prefill"):
            assert torch.equal(after_the_prompt(model, IDS[:, :8], IDS[:, 8:]), whole)
        with applied.in_phase("decode"):
            assert torch.equal(after_the_prompt(model, IDS[:, :8], IDS[:, 8:]), torch.cat([whole[:, :8], left_out], 1))
        with pytest.raises(SkipError, match='expected phase "prefill" or "decode"'), applied.in_phase("both"):
            pass
    with SublayerPlan(mlp=[1, 2]).apply(model):  # nothing to tell apart
        after_the_prompt(model, IDS[:, :8], IDS[:, 8:])


def test_the_last_token_of_a_prompt_is_read_as_the_others_are():
    """The rest was in a cache already; after the first decoded token a single one goes on with the text."""
    model = LLAMA.build()
    with PLANS["decode"].apply(model):
        expected = model.generate(IDS, **GREEDY)
    cache = DynamicCache(config=model.config)
    model(IDS[:, :-1], **{CACHE: cache})
    with PLANS["decode"].apply(model) as applied:
        first = model.generate(IDS, **{CACHE: cache}, **GREEDY | {"max_new_tokens": 12})
        assert applied.stats.skips["model.layers.1.mlp"] == applied.stats.passes - 1 == 11
        assert torch.equal(model.generate(first, **{CACHE: cache}, **GREEDY | {"max_new_tokens": 12}), expected)
        assert applied.stats.skips["model.layers.1.mlp"] == applied.stats.passes - 1 == 23


def test_a_later_chunk_does_not_start_a_sequence():
    model, seen = LLAMA.build(), []
    with watch(model, lambda *_: None, lambda now: seen.append((now.tokens, now.fresh, now.decode))):
        model.generate(IDS, max_new_tokens=3, do_sample=False, prefill_chunk_size=6)
    assert seen == [(6, True, False), (6, False, False), (1, False, False), (1, False, True), (1, False, True)]


def test_the_online_stage_adds_nothing_where_drafts_are_verified(caplog):
    """What is rejected of a draft would be measured with it; it is said once."""
    model = LLAMA.build()
    stats = AdaSkip.calibrate(model, [IDS])
    with AdaSkip(count=2, online=False).apply(model, stats):
        expected = model.generate(IDS, **GREEDY)
    with AdaSkip(count=2, window=3).apply(model, stats) as applied, caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(model.generate(IDS, **GREEDY, prompt_lookup_num_tokens=4), expected)
        assert not applied.extra
    assert [record.message.partition(":")[0] for record in caplog.records if record.name.startswith("skipguide")] == [
        "several tokens at once are decoded"
    ]


def policies(model):
    stats = AdaSkip.calibrate(model, [IDS])
    return {
        "plan": lambda **how: PLANS["both"].apply(model, **how),
        "unified": lambda **how: UnifiedSkip(2.0, phase="both").apply(model, **how),
        "adaskip": lambda **how: AdaSkip(count=2).apply(model, stats, **how),
        "adaskip that measures": lambda **how: AdaSkip(count=2).apply(model, **how),
        "everywhere": lambda **how: UnifiedSkip(2.0, phase="both").apply(model, everywhere=True),
        "self-speculative": lambda **how: SelfSpeculative().apply(model),
    }


@pytest.mark.parametrize("name", policies(LLAMA.build()))
def test_continuous_batching_is_refused_in_the_caller(name):
    """Its worker kept the refusal in its log, and the caller got empty texts."""
    model = LLAMA.build()
    before = set(vars(model))
    apply = policies(model)[name]
    for call in (
        lambda: model.generate_batch([[5, 6, 7], [8, 9]], max_new_tokens=2),
        lambda: model.generate(IDS, max_new_tokens=2, cache_implementation="paged"),
        lambda: model.init_continuous_batching(),
    ):
        applied = apply()
        with pytest.raises(SkipError, match="continuous batching"):
            call()
        applied.remove()
    assert set(vars(model)) == before
    assert type(model.init_continuous_batching()).__name__ == "ContinuousBatchingManager", "and not a moment longer"


def test_what_stood_in_a_methods_place_is_back_in_any_order():
    model = LLAMA.build()
    model.init_continuous_batching = mine = lambda: "mine"
    first, second = SelfSpeculative().apply(model), PLANS["both"].apply(model)
    first.remove()
    with pytest.raises(SkipError, match="sublayers are left out"):
        model.init_continuous_batching()
    second.remove()
    second.remove()
    assert model.init_continuous_batching is mine
