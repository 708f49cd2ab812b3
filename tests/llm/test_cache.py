"""KV caches under a sublayer plan: what is left out is really gone, and no cache is continued under another plan."""

import copy
import pickle

import pytest
import torch
from helpers import llm_zoo
from helpers.llm_zoo import BY_NAME, CACHE, prompt
from torch import nn
from transformers import DynamicCache, StaticCache, cache_utils

from skipguide import Prefix, SkipError, capture, resume
from skipguide.arguments import Arguments
from skipguide.hosts import kv_cache as kv
from skipguide.llm import AdaSkip, SublayerPlan, SublayerStats

# KV caches under a sublayer plan: what is left out is really gone, and no cache is continued under another plan.

LLAMA, GEMMA2 = llm_zoo.BY_NAME["llama"], llm_zoo.BY_NAME["gemma2"]
IDS = llm_zoo.prompt()
TOKEN = IDS[:, :1]
BOTH, DECODE = SublayerPlan(attn=[0, 2], mlp=[1]), SublayerPlan(attn=[0, 2], mlp=[1], phase="decode")


def caches(model):
    return {
        "made by the model": None,
        "lazy": DynamicCache(),
        "dynamic": DynamicCache(config=model.config),
        "static": StaticCache(config=model.config, max_cache_len=16),
    }


def steps(model, cache, count=3):
    """Logits of a left-padded prompt and of some steps after it, and the cache."""
    ids, mask = llm_zoo.left_padded()
    out = model(ids, attention_mask=mask, **{CACHE: cache}, use_cache=True)
    logits, cache = [out.logits], out[CACHE]
    for _ in range(count):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        logits.append(model(TOKEN, attention_mask=mask, **{CACHE: cache}).logits)
    return logits, cache


@pytest.mark.parametrize("lm", [LLAMA, GEMMA2], ids=repr)
@pytest.mark.parametrize("kind", list(caches(LLAMA.build())))
def test_every_kind_of_cache(lm, kind):
    model = lm.build()
    zeroed = lm.zeroed(model, BOTH.attn, BOTH.mlp)
    expected, full = steps(zeroed, caches(zeroed)[kind])
    with BOTH.apply(model) as applied:
        got, cache = steps(model, caches(model)[kind])
        assert all(map(torch.equal, got, expected))
        assert applied.stats.kv_bytes_saved == applied.stats.kv_bytes > 0
    held = [getattr(layer, "keys", None) is not None for layer in cache.layers]
    assert held == [False, True, False, True] and int(cache.get_seq_length()) == int(full.get_seq_length()) == 10


def test_a_decode_plan_frees_the_prompts_keys():
    model = LLAMA.build()
    zeroed = LLAMA.zeroed(model, DECODE.attn, DECODE.mlp)
    ids, mask = llm_zoo.left_padded()
    with DECODE.apply(model) as applied:
        out = model(ids, attention_mask=mask, use_cache=True)
        cache = out[CACHE]
        assert all(layer.keys is not None for layer in cache.layers) and applied.stats.kv_bytes_saved == 0
        full = copy.deepcopy(cache)
        del full._skipguide_mark
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        step = model(TOKEN, attention_mask=mask, **{CACHE: cache}).logits
        assert cache.layers[0].keys is None and cache.layers[1].keys.shape[2] == 8
        # another chunk of prompt: the attention stays out, the feed-forward is back
        mask = torch.cat([mask, torch.ones_like(mask[:, :2])], 1)
        with applied.in_phase("prefill"):
            chunk = model(IDS[:, :2], attention_mask=mask, **{CACHE: cache}).logits
    assert torch.equal(step, zeroed(TOKEN, attention_mask=mask[:, :8], **{CACHE: full}).logits)
    expected = LLAMA.zeroed(model, DECODE.attn)(IDS[:, :2], attention_mask=mask, **{CACHE: full}).logits
    assert torch.equal(chunk, expected)


def test_early_exit_makes_a_cache_of_the_first_layers_only():
    model, plan = LLAMA.build(), SublayerPlan(attn=[1, 3], mlp=[2])
    ids = IDS[:1]
    settings = {"max_new_tokens": 6, "do_sample": False}
    expected = LLAMA.zeroed(model, plan.attn, plan.mlp).generate(ids, **settings)
    with plan.apply(model):
        got = model.generate(ids, assistant_early_exit=2, **settings)
    assert torch.equal(got, expected)


def test_a_prompt_of_one_token_is_a_prompt():
    model = LLAMA.build()
    for use_cache in (True, False):
        with SublayerPlan(mlp=[1, 2], phase="decode").apply(model) as applied:
            out = model(TOKEN, use_cache=use_cache).logits
        assert torch.equal(out, model(TOKEN).logits) and not applied.stats.skips


def test_a_decode_plan_goes_on_from_the_whole_models_cache():
    model = LLAMA.build()
    zeroed = LLAMA.zeroed(model, DECODE.attn, DECODE.mlp)
    cache = model(IDS, use_cache=True)[CACHE]
    twin = copy.deepcopy(cache)
    with DECODE.apply(model):
        out = model(TOKEN, **{CACHE: cache}).logits
    assert torch.equal(out, zeroed(TOKEN, **{CACHE: twin}).logits)


def test_a_cache_made_under_another_plan_is_refused():
    model = LLAMA.build()
    with BOTH.apply(model):
        cache = model(IDS, use_cache=True)[CACHE]
    for other in (SublayerPlan(attn=[0], mlp=[1]), SublayerPlan(BOTH.attn), DECODE, SublayerPlan()):
        with other.apply(model), pytest.raises(SkipError, match="made under another plan"):
            model(TOKEN, **{CACHE: copy.deepcopy(cache)})
    with pytest.raises(SkipError, match="start a new sequence"):
        model(TOKEN, **{CACHE: copy.deepcopy(cache)})
    with SublayerPlan(BOTH.attn, BOTH.mlp).apply(model):  # an equal plan is the same plan
        model(TOKEN, **{CACHE: cache})
    full = model(IDS, use_cache=True)[CACHE]
    with BOTH.apply(model), pytest.raises(SkipError, match="holds 7 tokens of the whole model"):
        model(TOKEN, **{CACHE: full})
    assert full.get_seq_length() == 7 and not hasattr(full, "_skipguide_mark")
    model(TOKEN, **{CACHE: full})


def test_caches_are_copied_pickled_cropped_and_reordered():
    model = LLAMA.build()
    with BOTH.apply(model):
        cache = model(IDS, use_cache=True)[CACHE]
        expected = model(TOKEN, **{CACHE: copy.deepcopy(cache)}).logits
        assert torch.equal(model(TOKEN, **{CACHE: pickle.loads(pickle.dumps(cache))}).logits, expected)
        model(TOKEN, **{CACHE: cache})
        cache.crop(-1)
        assert torch.equal(model(TOKEN, **{CACHE: cache}).logits, expected)
        cache.crop(-1)
        cache.reorder_cache(torch.tensor([1, 0]))
        assert torch.equal(model(TOKEN.flip(0), **{CACHE: cache}).logits, expected.flip(0))
        cache.crop(-1)
        cache.batch_select_indices(torch.tensor([1]))
        torch.testing.assert_close(model(TOKEN[:1], **{CACHE: cache}).logits, expected[:1])


def test_a_conversation_of_two_turns():
    """The cache that generate returns is continued with more prompt, under the same plan."""
    model = LLAMA.build()
    zeroed = LLAMA.zeroed(model, BOTH.attn, BOTH.mlp)

    def talk(model):
        first = model.generate(IDS, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        longer = torch.cat([first.sequences, IDS[:, :4]], 1)
        return model.generate(longer, **{CACHE: first[CACHE]}, max_new_tokens=3, do_sample=False)

    with BOTH.apply(model):
        assert torch.equal(talk(model), talk(zeroed))


def test_without_the_dummy_layer_of_transformers(monkeypatch):
    """An own layer that asks a kept one for its length; the same results."""
    model = LLAMA.build()
    zeroed = LLAMA.zeroed(model, BOTH.attn, BOTH.mlp)
    monkeypatch.delattr(cache_utils, "DummyLayer")
    for kind in ("lazy", "dynamic", "static"):
        cache = caches(model)[kind]
        kv.hide(cache, (0, 2), 4)
        assert isinstance(cache.layers[0], cache_utils.CacheLayerMixin)
    monkeypatch.undo()
    hide = kv.stand_in
    with monkeypatch.context() as patch:
        patch.setattr(kv, "stand_in", lambda kept: _by_length(kept, hide, patch))
        with BOTH.apply(model):
            for kind in ("lazy", "dynamic", "static"):
                got, cache = steps(model, caches(model)[kind])
                expected, _ = steps(zeroed, caches(zeroed)[kind])
                assert all(map(torch.equal, got, expected))
                assert int(cache.layers[0].get_seq_length()) == 10


def _by_length(kept, stand_in, patch):
    with patch.context() as inner:
        inner.delattr(cache_utils, "DummyLayer")
        return stand_in(kept)


def test_the_memory_is_not_allocated():
    """Nothing as large as a layer's keys stays alive for the left-out attention."""
    model = LLAMA.build()
    with BOTH.apply(model):
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(IDS, **{CACHE: cache})
    assert sum(
        t.nbytes for layer in cache.layers for t in vars(layer).values() if isinstance(t, torch.Tensor)
    ) < 2.1 * (cache.layers[1].keys.nbytes + cache.layers[1].values.nbytes)


def test_a_cache_that_was_reset_starts_another_sequence():
    model = LLAMA.build()
    cache, plan = StaticCache(config=model.config, max_cache_len=16), SublayerPlan(attn=[0], mlp=[1])
    with plan.apply(model) as applied:
        fresh = []
        applied.listeners.append(lambda now: fresh.append(now.fresh))
        first = model(IDS, **{CACHE: cache}).logits
        applied.extend([3])
        cache.reset()
        assert torch.equal(model(IDS, **{CACHE: cache}).logits, first)
        model(TOKEN, **{CACHE: cache})
        assert fresh == [True, True, False] and applied.extra == {}
    with SublayerPlan(attn=[0], phase="decode").apply(model):
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(IDS, **{CACHE: cache})
        model(TOKEN, **{CACHE: cache})
        cache.reset()
        with pytest.raises(SkipError, match="use a new cache"):
            model(IDS, **{CACHE: cache})


def test_resuming_from_the_middle_refuses_a_cache():
    model, prefix = LLAMA.build(), Prefix(2)
    with capture(model, prefix):
        out = model(IDS, use_cache=False).logits
    with resume(model, prefix):
        assert torch.equal(model(IDS, use_cache=False).logits, out)
        with pytest.raises(SkipError, match="use_cache=False"):
            model(IDS, use_cache=True)


class New(nn.Module):
    def forward(self, ids, cache=None):
        return cache


class Old(nn.Module):
    def forward(self, ids, past_key_values=None):
        return past_key_values


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize(("model", "name"), [(New(), "cache"), (Old(), "past_key_values")], ids=["new", "old"])
def test_a_cache_is_given_and_found_by_either_name(model, name):
    """transformers 5.24 renames it; what is installed knows only one of the names."""
    cache, other = object(), object()
    for taker in (model, Wrapper(model), type(model)().forward):
        assert kv.as_argument(taker, cache) == {name: cache}
    assert Wrapper(model)(0, **kv.as_argument(Wrapper(model), cache)) is cache
    assert kv.cache_among({"use_cache": True, name: cache}) is cache and kv.cache_among({name: None}) is None
    assert kv.cache_of(type("Output", (), {name: cache})()) is cache and kv.cache_of(object()) is None
    arguments = Arguments(model)
    for args, kwargs in (((0, cache), {}), ((0,), {name: cache})):
        assert kv.given_cache(arguments, args, kwargs) is cache
    assert kv.given_cache(arguments, (0,), {"other": other}) is None
    with pytest.raises(SkipError, match="Linear, which does not"):
        kv.cache_argument(nn.Linear(1, 1))


# A KV cache that was reset, or cropped to nothing, starts another sequence, even with a prompt of one token.

PROMPT, LETTER = prompt(1, 7), prompt(1, 1, seed=5)


@pytest.fixture(scope="module")
def model():
    return BY_NAME["llama"].build()


def emptied(model, kind):
    """A cache after a prompt and a decoding step, and without them again."""
    cache = (
        StaticCache(config=model.config, max_cache_len=16) if kind == "static" else DynamicCache(config=model.config)
    )
    for ids in (PROMPT, LETTER):
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
        expected = model(LETTER).logits
        applied.listeners.append(lambda now: seen.append((now.fresh, now.decode)))
        seen = []
        assert torch.allclose(model(LETTER, **{CACHE: cache}).logits, expected, atol=1e-5)
        model(LETTER, **{CACHE: cache})
    assert seen == [(True, False), (False, True)]


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_the_whole_model_cannot_read_it_where_keys_are_gone(model, kind):
    with SublayerPlan(attn=[0], phase="decode").apply(model):
        cache = emptied(model, kind)
        with pytest.raises(SkipError, match="use a new cache"):
            model(LETTER, **{CACHE: cache})


def test_what_the_online_stage_added_ends_with_its_sequence(model):
    stats = SublayerStats(*[(0.5,) * 4] * 2, *[(1.0,) * 4] * 2)
    with AdaSkip(count=1, part="mlp", window=1).apply(model, stats) as applied:
        cache = emptied(model, "static")
        for ids in (PROMPT, LETTER, LETTER):
            model(ids, **{CACHE: cache})
        assert applied.extra
        cache.reset()
        model(LETTER, **{CACHE: cache})
        assert not applied.extra
