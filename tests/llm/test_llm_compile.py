"""torch.compile with a sublayer plan: one graph for all decode steps, right results on, off and on again."""

import logging

import pytest
import torch
from helpers import llm_zoo
from helpers.llm_zoo import CACHE
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import StaticCache

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
