"""AdaSkip in threads, tasks and turns: the first request is measured once, where AdaSkip was applied."""

import asyncio
import threading

import pytest
import torch
from helpers import adaskip_golden
from helpers.adaskip_golden import generate, lengths
from helpers.llm_zoo import CACHE

from skipguide.errors import NoEffectError
from skipguide.llm import AdaSkip

golden, model = adaskip_golden.golden, adaskip_golden.model


def test_the_first_request_is_measured_where_adaskip_was_applied(golden, model):
    def elsewhere():
        thread = threading.Thread(target=generate, args=(model, golden["prompt"], 3))
        thread.start()
        thread.join(120)

    with AdaSkip(count=4).apply(model) as applied:
        elsewhere()
        assert applied.plan is None
        generate(model, golden["prompt"], 3)
        generate(model, golden["prompt"], 3)
        assert applied.plan is not None and applied.stats.passes == 2 + 3
    with pytest.raises(NoEffectError, match="all 3 passes ran in others"), AdaSkip(count=4).apply(model):
        elsewhere()


def test_tasks_of_the_place_where_adaskip_was_applied_share_it(golden, model):
    """Every one of them runs in a copy of that context: what the first one measured holds in the next, and outside."""

    async def serve(applied):
        for _ in range(2):
            await asyncio.to_thread(generate, model, golden["prompt"], 3)
        generate(model, golden["prompt"], 3)
        return applied.stats.passes

    with AdaSkip(count=4).apply(model) as applied:
        assert asyncio.run(serve(applied)) == 2 + 3 + 3


def test_tasks_at_once_are_measured_one_by_one_and_decode_as_if_alone(golden, model):
    prompts = [golden["prompt"], golden["prompt2"], golden["prompt"][:20]]
    settings = AdaSkip(count=4, phase="decode", window=3)

    async def serve():
        return await asyncio.gather(*(asyncio.to_thread(generate, model, prompt, 12) for prompt in prompts))

    with settings.apply(model) as applied:
        asyncio.run(serve())
        together = asyncio.run(serve())
        assert applied.statistics.requests == 1
    for prompt, (tokens, _, _) in zip(prompts, together, strict=True):
        with settings.apply(model, applied.statistics):
            alone, _, _ = generate(model, prompt, 12)
        assert torch.equal(tokens, alone)


def test_requests_that_take_turns_while_the_first_is_measured(golden, model):
    """The second prompt ends the measurement; the first sequence goes on under the plan all the same."""
    first, second = (torch.tensor([golden[name]]) for name in ("prompt", "prompt2"))
    with AdaSkip(count=4, online=False).apply(model) as applied, torch.no_grad():
        cache = model(first, use_cache=True)[CACHE]
        model(second, use_cache=True)
        step = model(first[:, :1], **{CACHE: cache}).logits
        assert lengths(cache, 8) == [None if i in applied.plan.attn else first.shape[1] + 1 for i in range(8)]
    with AdaSkip(count=4, online=False, phase="decode").apply(model, applied.statistics), torch.no_grad():
        cache = model(first, use_cache=True)[CACHE]
        assert torch.equal(step, model(first[:, :1], **{CACHE: cache}).logits)


def forced(model, prompt, tokens):
    """Logits of the given tokens after a prompt, one pass each."""
    with torch.no_grad():
        out = model(prompt, use_cache=True)
        found = [out.logits[:, -1]]
        for token in tokens[0, :-1]:
            out = model(token.view(1, 1), **{CACHE: out[CACHE]})
            found.append(out.logits[:, -1])
    return torch.stack(found, 1)


def test_guidance_of_transformers_is_two_requests_that_take_turns(golden, model):
    """Its processor runs the last token of the prompt as another sequence, with a cache of its own, between the steps:
    both sequences are what each is alone under the plan."""
    settings = AdaSkip(count=4, online=False, phase="decode")
    with settings.apply(model) as applied:
        tokens, logits, _ = generate(model, golden["prompt"], 8, guidance_scale=3.0)
        plain, _, _ = generate(model, golden["prompt"], 8)
    assert applied.statistics.requests == 1 and not torch.equal(tokens, plain)
    prompt = torch.tensor([golden["prompt"]])
    with settings.apply(model, applied.statistics):
        conditional, other = (forced(model, ids, tokens) for ids in (prompt, prompt[:, -1:]))
    torch.testing.assert_close(logits, conditional, atol=1e-5, rtol=0)
    c, u = conditional.log_softmax(-1), other.log_softmax(-1)
    assert torch.equal(tokens, (u + 3.0 * (c - u)).argmax(-1))


def test_prompts_that_are_too_short_to_be_measured_are_no_silent_nothing(golden, model):
    with pytest.raises(NoEffectError, match="two tokens or more"), AdaSkip(count=4).apply(model):
        generate(model, golden["prompt"][:1], 4)
    with AdaSkip(count=4).apply(model) as applied:
        generate(model, golden["prompt"][:1], 4)
        generate(model, golden["prompt"], 4)
        assert applied.plan is not None
