"""AdaSkip's online stage: its window changes nothing, and what it adds runs as a plan of its own."""

import copy
import gc
import weakref

import pytest
import torch
from helpers import adaskip_golden
from helpers.adaskip_golden import generate, padded
from helpers.llm_zoo import CACHE
from transformers import DynamicCache, StaticCache

from skipguide.active import active_plans
from skipguide.llm import AdaSkip, SublayerPlan

golden, model, stats = adaskip_golden.golden, adaskip_golden.model, adaskip_golden.stats


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
