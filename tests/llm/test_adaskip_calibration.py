"""AdaSkip measures: its statistics, the online stage, and the first request in threads, tasks and turns."""

import asyncio
import copy
import gc
import math
import threading
import weakref

import pytest
import torch
from helpers import adaskip_golden
from helpers.adaskip_golden import generate, lengths, padded
from helpers.llm_zoo import CACHE
from transformers import DynamicCache, StaticCache

from skipguide.active import active_plans
from skipguide.errors import NoEffectError, SkipError
from skipguide.llm import AdaSkip, SublayerPlan
from skipguide.llm.cost import measure_costs

pytestmark = pytest.mark.numerics

# AdaSkip's statistics: the same however a prompt comes, of the whole model only, and nothing is left.

golden, model, stats = adaskip_golden.golden, adaskip_golden.model, adaskip_golden.stats


def test_left_padding_changes_no_statistic(golden, model, stats):
    ids, mask = padded(golden["warmup_ids"])
    found = AdaSkip.calibrate(model, [{"input_ids": ids, "attention_mask": mask}])
    assert found.requests == stats.requests and found.tokens == pytest.approx(stats.tokens)
    for name in ("attn_similarity", "mlp_similarity", "attn_scale", "mlp_scale", "block_similarity"):
        assert getattr(found, name) == pytest.approx(getattr(stats, name), abs=1e-5)


def test_without_statistics_the_first_prompt_is_measured_and_runs_whole(golden, model):
    prompt = golden["prompt"]
    measured = AdaSkip.calibrate(model, [prompt])
    with AdaSkip(count=4, online=False).apply(model) as applied:
        assert applied.plan is None
        tokens, scores, cache = generate(model, prompt)
        assert applied.statistics == measured
        assert lengths(cache, 8) == [None if i in applied.plan.attn else 71 for i in range(8)]
        again, _, _ = generate(model, prompt)
    with AdaSkip(count=4, phase="decode", online=False).apply(model, measured):
        decode, decode_scores, _ = generate(model, prompt)
    with AdaSkip(count=4, phase="both", online=False).apply(model, measured):
        both, _, _ = generate(model, prompt)
    assert torch.equal(tokens, decode) and torch.equal(scores, decode_scores)  # the first request: prompt whole
    assert torch.equal(again, both)  # the second: skipped from its first token


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_is_masked_with_a_static_cache_too(golden, model, attention):
    """Generation hands the decoder a mask [B, 1, T, S] then."""
    prompts = [golden["prompt"], golden["prompt2"]]
    ids, mask = padded(prompts)
    model.set_attn_implementation(attention)
    try:
        with AdaSkip(count=2, online=False).apply(model) as applied, torch.no_grad():
            model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, cache_implementation="static")
            measured = applied.statistics
    finally:
        model.set_attn_implementation("sdpa")
    plain = AdaSkip.calibrate(model, prompts)
    assert (measured.requests, measured.tokens) == (2, plain.tokens)
    assert measured.attn_similarity == pytest.approx(plain.attn_similarity, abs=1e-5)
    assert measured.mlp_scale == pytest.approx(plain.mlp_scale, abs=1e-5)


def test_a_prompt_in_chunks_is_measured_as_one(golden, model):
    prompt = golden["prompt"]
    with AdaSkip(count=4, online=False).apply(model) as applied:
        generate(model, prompt, prefill_chunk_size=16)
        chunked = applied.statistics
    whole = AdaSkip.calibrate(model, [prompt])
    assert chunked.requests == 1 and chunked.tokens == len(prompt)
    assert chunked.attn_similarity == pytest.approx(whole.attn_similarity, abs=1e-5)


def test_calibration_leaves_nothing_and_returns_the_model_to_training(golden, model):
    before = {name: (set(m.__dict__), len(m._forward_hooks), m.training) for name, m in model.named_modules()}
    model.train()
    model.model.layers[3].eval()  # frozen, say
    AdaSkip.calibrate(model, [golden["prompt"]])
    assert model.training and model.model.layers[4].training and not model.model.layers[3].training
    model.eval()
    with AdaSkip(count=4).apply(model):
        generate(model, golden["prompt"], 4)
    with pytest.raises(RuntimeError, match="stop"), AdaSkip(count=4).apply(model):
        generate(model, golden["prompt"], 4)
        raise RuntimeError("stop")
    assert {name: (set(m.__dict__), len(m._forward_hooks), m.training) for name, m in model.named_modules()} == before


def test_only_the_whole_model_is_measured(golden, model, stats):
    with SublayerPlan(mlp=[2]).apply(model) as applied:
        with pytest.raises(SkipError, match="only the whole model can be measured"):
            AdaSkip.calibrate(model, [golden["prompt"]])
        with pytest.raises(SkipError, match="only the whole model can be measured"):
            measure_costs(model, 8)
        applied.enabled = False
        assert AdaSkip.calibrate(model, [golden["prompt"]]).requests == 1


def test_nan_is_refused_at_calibration_and_while_decoding(golden, model, stats):
    weight = model.model.layers[7].mlp.down_proj.weight
    kept = weight.data.clone()
    try:
        weight.data[0, 0] = math.nan
        with pytest.raises(SkipError, match="layer 7 is nan"):
            AdaSkip.calibrate(model, [golden["prompt"]])
        with (
            pytest.raises(SkipError, match="layer 7 has similarity nan"),
            AdaSkip(count=2, window=2).apply(model, stats),
        ):
            generate(model, golden["prompt"], 6)
    finally:
        weight.data.copy_(kept)


# AdaSkip's online stage: its window changes nothing, and what it adds runs as a plan of its own.


def test_the_online_stage_only_adds_and_starts_anew_with_every_request(golden, model, stats):
    settings = AdaSkip(count=2, phase="decode", window=5)
    with settings.apply(model, stats) as applied:
        applied._thresholds = [0.95] * 8  # lower than this model's, so that something is added
        generate(model, golden["prompt"], 5)
        assert applied.extra == {} and not applied.window.similarity  # 4 decoding passes: the window is not full
        generate(model, golden["prompt"], 12)
        window = applied.window
        added = {i for i, value in enumerate(window.similarity) if value >= 0.95}
        assert added and set(applied.extra) == added and not added & set(applied.plan.mlp)
        assert applied.extra == {i: window.scale[i] for i in added}
        assert all(applied.stats.skips[f"model.layers.{i}.mlp"] for i in added)
        with torch.no_grad():
            generate(model, golden["prompt2"], 2)
        assert applied.extra == {} and applied.window is not window


def test_the_window_runs_as_without_the_online_stage(golden, model, stats):
    with AdaSkip(count=6, online=False).apply(model, stats):
        off, off_scores, _ = generate(model, golden["prompt"], 20)
    with AdaSkip(count=6, online=True).apply(model, stats) as applied:
        on, scores, _ = generate(model, golden["prompt"], 20)
        assert applied.window.seen == 19
    assert torch.equal(on, off) and torch.equal(scores, off_scores)


def test_added_mlps_run_as_a_plan_of_their_own(golden, model, stats):
    """From the window on, the model is the one without those MLPs: same logits as a plan that names them."""
    settings = AdaSkip(count=2, phase="decode", window=3)
    with settings.apply(model, stats) as applied:
        applied._thresholds = [0.95] * 8
        tokens, scores, _ = generate(model, golden["prompt"], 8)
        plan, extra = applied.plan, applied.extra
    grown = SublayerPlan(
        plan.attn, (*plan.mlp, *extra), plan.attn_scale, {**plan.mlp_scale, **extra}, phase="decode"
    )  # fmt: skip
    ids = torch.tensor([golden["prompt"]])
    cache = DynamicCache()
    with plan.apply(model), torch.no_grad():
        model(ids, **{CACHE: cache})
        for step in range(3):
            model(tokens[:, step : step + 1], **{CACHE: cache})
    del cache._skipguide_mark
    with grown.apply(model), torch.no_grad():
        last = model(tokens[:, 3:4], **{CACHE: cache}).logits[:, -1]
    torch.testing.assert_close(last, scores[:, 4], atol=1e-5, rtol=1e-5)


def test_a_sequence_goes_on_under_another_handle_with_what_was_added(golden, model, stats):
    settings, cache, ran = AdaSkip(count=2, phase="decode", window=3), DynamicCache(), []
    with settings.apply(model, stats) as applied:
        applied._thresholds = [0.95] * 8
        tokens, _, _ = generate(model, golden["prompt"], 8, cache)
        added = applied.extra
    text = [*golden["prompt"], *tokens[0].tolist()]
    with settings.apply(model, stats) as applied:
        hooks = [
            layer.mlp.down_proj.register_forward_hook(lambda *_, i=i: ran.append(i))
            for i, layer in enumerate(model.model.layers)
        ]
        generate(model, text, 4, cache)
        for hook in hooks:
            hook.remove()
    assert added and applied.stats.passes == 4
    names = {i: f"model.layers.{i}.mlp" for i in range(8)}
    assert {names[i]: ran.count(i) for i in names} == {n: applied.stats.calls[n] for n in names.values()}
    assert not set(added) & set(ran) and all(applied.stats.skips[names[i]] == 4 for i in added)


def test_a_cache_that_was_reset_has_an_online_stage_again(golden, model, stats):
    cache = StaticCache(config=model.config, max_cache_len=80)
    with AdaSkip(count=2, window=3).apply(model, stats) as applied:
        applied._thresholds = [0.95] * 8
        generate(model, golden["prompt"], 8, cache)
        added, window = applied.extra, applied.window
        cache.reset()
        generate(model, golden["prompt"], 8, cache)
        assert added and applied.extra == pytest.approx(added) and applied.window is not window


def test_a_model_is_let_go_with_its_handle_while_it_is_watched(golden, model):
    frames = active_plans()
    mine = copy.deepcopy(model)
    applied = AdaSkip(count=2).apply(mine)
    generate(mine, golden["prompt"], 4)
    assert applied.window.seen == 3 and active_plans()[-1].live
    gone = weakref.ref(mine)
    del mine, applied
    gc.collect()
    assert gone() is None and active_plans() == frames


def test_batches_of_left_padded_prompts(golden, model, stats):
    prompts = [golden["prompt"], golden["prompt2"]]
    ids, mask = padded(prompts)
    with AdaSkip(count=6, online=False).apply(model, stats):
        both, _, _ = generate(model, ids, 12, attention_mask=mask)
        apart = [generate(model, p, 12)[0][0].tolist() for p in prompts]
    assert both.tolist() == apart
    with AdaSkip(count=6, window=4).apply(model, stats) as applied:
        generate(model, ids, 12, attention_mask=mask)
        assert len(applied.window.similarity) == 8


# AdaSkip in threads, tasks and turns: the first request is measured once, where AdaSkip was applied.


def test_the_first_request_is_measured_where_adaskip_was_applied(golden, model):
    def elsewhere():
        thread = threading.Thread(target=generate, args=(model, golden["prompt"], 3))
        thread.start()
        thread.join(600)

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
