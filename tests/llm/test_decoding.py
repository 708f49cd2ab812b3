"""Decoding under a sublayer plan: few calls a token; compiled, one graph for all steps, right results on and off."""

import logging

import pytest
import torch
from helpers import llm_zoo
from helpers.call_counter import CallCounter
from helpers.llm_zoo import CACHE
from helpers.versions import traced_plans
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from skipguide.llm import SublayerPlan


@pytest.fixture(autouse=True)
def _quiet():
    """Dynamo's trace log is for people; pytest would collect every line of it."""
    logging.disable(logging.DEBUG)
    yield
    logging.disable(logging.NOTSET)


IDS = llm_zoo.prompt()


def decode(model, step, count=4):
    """Logits of greedy steps on a static cache; the prompt is read uncompiled, as `generate` does."""
    cache = StaticCache(config=model.config, max_cache_len=32)
    token, logits = model(IDS, **{CACHE: cache}).logits[:, -1:].argmax(-1), []
    for i in range(count):
        position = torch.full((1, 1), IDS.shape[1] + i)
        out = step(token, **{CACHE: cache}, position_ids=position).logits
        token = out.argmax(-1)
        logits.append(out)
    return logits


def close(one, other):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@traced_plans
@pytest.mark.parametrize("name", ["llama"])
def test_one_graph_for_all_steps_and_both_ways_of_the_switch(name):
    torch._dynamo.reset()
    counters.clear()
    lm = llm_zoo.BY_NAME[name]
    model = lm.build()
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(model, backend=counter, fullgraph=True)
    plan = SublayerPlan(attn=[0, 2], mlp=[1, 2])
    plain, skipped = decode(model, model), decode(z := lm.zeroed(model, plan.attn, plan.mlp), z)
    close(decode(model, step), plain)
    before = counter.frame_count
    with plan.apply(model):
        close(decode(model, step), skipped)
        first = counter.frame_count - before
        close(decode(model, step), skipped)
        assert counter.frame_count - before == first <= 1
    close(decode(model, step), plain)
    with plan.apply(model):
        close(decode(model, step), skipped)
    assert counter.frame_count - before == first and not counters["graph_break"]


def test_a_prompt_that_is_read_compiled_is_a_prompt():
    """A decode plan on a compiled model left nothing out, and said nothing."""
    torch._dynamo.reset()
    model = llm_zoo.BY_NAME["llama"].build(num_hidden_layers=2)
    plan = SublayerPlan(mlp=[1], phase="decode")
    compiled, found = torch.compile(model, backend="eager"), []
    for call in (model, compiled):
        cache = DynamicCache(config=model.config)
        with plan.apply(model):
            call(IDS, **{CACHE: cache})
            found.append(call(IDS[:, :1], **{CACHE: cache}).logits)
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-4)


def test_a_decoded_token_takes_few_calls():
    """Counted in our files, which is the same on every machine."""
    tiny = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=30, **tiny)).eval()
    prompt, token = torch.arange(5)[None], torch.tensor([[3]])
    with torch.no_grad(), SublayerPlan(attn=[5, 9, 13], mlp=[7]).apply(model):
        cache = model(prompt, use_cache=True)[CACHE]
        for _ in range(3):
            model(token, **{CACHE: cache})
        counts = []
        for _ in range(2):
            with CallCounter() as counter:
                model(token, **{CACHE: cache})
            counts.append(counter.calls)
    assert counts[0] == counts[1], "every token makes the same calls"
    assert 0 < counts[0].total() <= 78, "\n".join(f"{number:5} {place}" for place, number in counts[0].most_common())
