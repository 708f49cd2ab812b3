"""A KV cache that was reset, or cropped to nothing, starts another sequence, even with a prompt of one token."""

import pytest
import torch
from helpers.llm_zoo import BY_NAME, CACHE, prompt
from transformers import DynamicCache, StaticCache

from skipguide.errors import SkipError
from skipguide.llm import AdaSkip, SublayerPlan, SublayerStats

IDS, TOKEN = prompt(1, 7), prompt(1, 1, seed=5)


@pytest.fixture(scope="module")
def model():
    return BY_NAME["llama"].build()


def emptied(model, kind):
    """A cache after a prompt and a decoding step, and without them again."""
    cache = (
        StaticCache(config=model.config, max_cache_len=16) if kind == "static" else DynamicCache(config=model.config)
    )
    for ids in (IDS, TOKEN):
        model(ids, use_cache=True, **{CACHE: cache})
    if kind == "static":
        cache.reset()
    else:
        cache.crop(-8)
    return cache


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("plan", [SublayerPlan(mlp=[1, 2], phase="decode"), SublayerPlan([0], [1, 2], phase="prefill")])
def test_a_prompt_of_one_token_is_a_prompt_again(model, kind, plan):
    with plan.apply(model) as applied:
        cache = emptied(model, kind)
        expected = model(TOKEN).logits
        applied.listeners.append(lambda now: seen.append((now.fresh, now.decode)))
        seen = []
        assert torch.allclose(model(TOKEN, **{CACHE: cache}).logits, expected, atol=1e-5)
        model(TOKEN, **{CACHE: cache})
    assert seen == [(True, False), (False, True)]


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_the_whole_model_cannot_read_it_where_keys_are_gone(model, kind):
    with SublayerPlan(attn=[0], phase="decode").apply(model):
        cache = emptied(model, kind)
        with pytest.raises(SkipError, match="use a new cache"):
            model(TOKEN, **{CACHE: cache})


def test_what_the_online_stage_added_ends_with_its_sequence(model):
    stats = SublayerStats(*[(0.5,) * 4] * 2, *[(1.0,) * 4] * 2)
    with AdaSkip(count=1, part="mlp", window=1).apply(model, stats) as applied:
        cache = emptied(model, "static")
        for ids in (IDS, TOKEN, TOKEN):
            model(ids, **{CACHE: cache})
        assert applied.extra
        cache.reset()
        model(TOKEN, **{CACHE: cache})
        assert not applied.extra
