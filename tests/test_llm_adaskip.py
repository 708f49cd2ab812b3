"""AdaSkip against the published code's outputs, and its laws."""

import asyncio
import copy
import gc
import json
import math
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llm_zoo import CACHE
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from skipguide.errors import NoEffectError, SkipError
from skipguide.gate import active_frames
from skipguide.llm import AdaSkip, SublayerPlan, SublayerStats, watch
from skipguide.llm.cost import SublayerCosts, measure_costs
from skipguide.llm.online import OnlineWindow
from skipguide.llm.similarity import RequestMeter

GOLDEN = Path(__file__).parent / "golden" / "llm"


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "adaskip_golden.json").read_text())


CASES = tuple(json.loads((GOLDEN / "adaskip_golden.json").read_text())["cases"])


@pytest.fixture(scope="module")
def logits():
    return load_file(GOLDEN / "adaskip_logits.safetensors")


@pytest.fixture(scope="module")
def model(golden):
    config = {k: v for k, v in golden["config"].items() if k != "rope_theta"}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": golden["config"]["rope_theta"]}
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    model.load_state_dict(load_file(GOLDEN / "adaskip_weights.safetensors"))
    return model


@pytest.fixture(scope="module")
def stats(golden, model):
    return AdaSkip.calibrate(model, golden["warmup_ids"])


def generate(model, prompt, tokens=32, cache=None, **settings):
    """Greedy tokens, the logits of every step, and the cache."""
    ids = torch.as_tensor(prompt)
    ids = ids[None] if ids.dim() == 1 else ids
    cache = DynamicCache() if cache is None else cache
    with torch.no_grad():
        out = model.generate(
            ids, max_new_tokens=tokens, do_sample=False, **{CACHE: cache}, output_logits=True, eos_token_id=None,
            return_dict_in_generate=True, **{"attention_mask": torch.ones_like(ids)} | settings,
        )  # fmt: skip
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1), cache


def lengths(cache, layers):
    """Tokens of keys per layer, None where there are none."""
    keys = [getattr(layer, "keys", None) for layer in cache.layers]
    return [None if k is None else k.shape[-2] for k in keys] + [None] * (layers - len(keys))


def settings_of(case):
    variant, _, online = case["variant"].partition("+")
    phase = {"prefill": "prefill", "decode": "decode", "e2e": "both"}[variant]
    return AdaSkip(count=case["N"], phase=phase, online=True, reference_compat=not online)


# -- the published code ------------------------------------------------------------------------------------------------


def test_statistics_and_ranking(golden, stats):
    for ours, theirs in (
        (stats.attn_similarity, "attn_sim"),
        (stats.mlp_similarity, "mlp_sim"),
        (stats.attn_scale, "attn_ratio"),
        (stats.mlp_scale, "mlp_ratio"),
    ):
        assert ours == pytest.approx(golden["stats"][theirs], abs=1e-6)
    assert stats.ranking() == golden["ranking"]
    assert stats.requests == golden["stats"]["diff_req_count"]


@pytest.mark.parametrize("name", CASES)
def test_case(name, golden, logits, model, stats):
    case = golden["cases"][name]
    with settings_of(case).apply(model, stats) as applied:
        assert applied.plan.attn == tuple(sorted(case["skip_attn"]))
        assert applied.plan.mlp == tuple(sorted(case["skip_mlp"]))
        tokens, scores, cache = generate(model, golden["prompt"], golden["max_new_tokens"])
        assert sorted(applied.extra) == case.get("extra_skip_mlp", case.get("extra_skip_mlp_official", []))
        if (window := applied.window) is not None:
            for ours, theirs in ((window.similarity, "mlp_decode_sim"), (window.scale, "mlp_decode_ratio")):
                expected = [math.nan if i in applied.plan.mlp else v for i, v in enumerate(case[theirs])]
                assert ours == pytest.approx(expected, abs=1e-6, nan_ok=True)
        if "tokens_second_request" in case:
            wanted = case["tokens_second_request"]
            second, _, _ = generate(model, golden["prompt2"], len(wanted))
            assert second[0].tolist() == wanted
    assert tokens[0].tolist() == case["tokens"]
    torch.testing.assert_close(scores[0], logits[f"{name}_logits"], atol=1e-4, rtol=0)
    # the published decode variant keeps the unused keys of the prompt; here they are freed
    kept = [None if i in case["skip_attn"] else n for i, n in enumerate(case["kv_len_per_layer"])]
    assert lengths(cache, 8) == kept


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("intended_online")])
def test_prefill_logits(name, golden, logits, model, stats):
    case = golden["cases"][name]
    with settings_of(case).apply(model, stats), torch.no_grad():
        scores = model(torch.tensor([golden["prompt2"]])).logits[0]
    torch.testing.assert_close(scores, logits[f"{name}_prefill_logits"], atol=1e-4, rtol=0)


# -- calibration -------------------------------------------------------------------------------------------------------


def test_left_padding_changes_no_statistic(golden, model, stats):
    prompts = golden["warmup_ids"]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    padded = AdaSkip.calibrate(model, [{"input_ids": ids, "attention_mask": mask}])
    assert padded.requests == stats.requests and padded.tokens == pytest.approx(stats.tokens)
    for name in ("attn_similarity", "mlp_similarity", "attn_scale", "mlp_scale", "block_similarity"):
        assert getattr(padded, name) == pytest.approx(getattr(stats, name), abs=1e-5)


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
    ids = torch.tensor([[0] * (40 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (40 - len(p)) + [1] * len(p) for p in prompts])
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


def test_the_published_code_measures_twenty_requests_before_it_skips(golden, model, stats):
    with AdaSkip(count=4, reference_compat=True).apply(model) as applied, torch.no_grad():
        for prompt in golden["warmup_ids"]:
            assert applied.plan is None
            model(torch.tensor([prompt]))
        generate(model, golden["prompt"], 2)
        assert applied.statistics.attn_similarity == pytest.approx(stats.attn_similarity, abs=1e-7)
        assert applied.plan.attn == tuple(sorted(golden["cases"]["e2e_N4"]["skip_attn"]))


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (AdaSkip(skip_ratio=0.99), "every attention"),
        (AdaSkip(target_speedup=100.0), "every attention"),
        (AdaSkip(count=8, part="attn"), "every attention"),
        (AdaSkip(count=9, part="mlp"), "there are 8 mlp sublayers"),
    ],
)
def test_what_no_statistics_could_make_possible_is_refused_before_they_are_measured(model, settings, message):
    with pytest.raises(SkipError, match=message):
        settings.apply(model)
    assert "forward" not in model.model.__dict__


def test_a_choice_that_fails_after_the_measurement_leaves_nothing(golden, model):
    applied = AdaSkip(target_speedup=1000.0, cost_aware=True).apply(model)
    for _ in range(2):  # not only the first request is told
        with pytest.raises(SkipError, match="speed-up from 1 to below"):
            generate(model, golden["prompt"], 3)
    applied.remove()
    assert "forward" not in model.model.__dict__
    plain, _, _ = generate(model, golden["prompt"], 3)
    assert plain.shape == (1, 3)


def test_a_second_plan_is_refused_while_the_first_waits_for_its_statistics(golden, model):
    with AdaSkip(count=2).apply(model):
        for second in (AdaSkip(count=3), SublayerPlan(mlp=[1])):
            with pytest.raises(SkipError, match="applied to this model already"):
                second.apply(model)
    with SublayerPlan(mlp=[1]).apply(model), pytest.raises(SkipError, match="applied to this model already"):
        AdaSkip(count=2).apply(model)
    assert "forward" not in model.model.__dict__


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
    with AdaSkip(count=4).apply(model):  # the processor of guidance has a cache of its own
        generate(model, golden["prompt"], 4, guidance_scale=1.5)


def test_prompts_that_are_too_short_to_be_measured_are_no_silent_nothing(golden, model):
    with pytest.raises(NoEffectError, match="two tokens or more"), AdaSkip(count=4).apply(model):
        generate(model, golden["prompt"][:1], 4)
    with AdaSkip(count=4).apply(model) as applied:
        generate(model, golden["prompt"][:1], 4)
        generate(model, golden["prompt"], 4)
        assert applied.plan is not None


# -- the online stage --------------------------------------------------------------------------------------------------


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
    frames = active_frames()
    mine = copy.deepcopy(model)
    applied = AdaSkip(count=2).apply(mine)
    generate(mine, golden["prompt"], 4)
    assert applied.window.seen == 3 and active_frames()[-1].live
    gone = weakref.ref(mine)
    del mine, applied
    gc.collect()
    assert gone() is None and active_frames() == frames


def test_batches_of_left_padded_prompts(golden, model, stats):
    prompts = [golden["prompt"], golden["prompt2"]]
    ids = torch.tensor([[0] * (40 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (40 - len(p)) + [1] * len(p) for p in prompts])
    with AdaSkip(count=6, online=False).apply(model, stats):
        both, _, _ = generate(model, ids, 12, attention_mask=mask)
        apart = [generate(model, p, 12)[0][0].tolist() for p in prompts]
    assert both.tolist() == apart
    with AdaSkip(count=6, window=4).apply(model, stats) as applied:
        generate(model, ids, 12, attention_mask=mask)
        assert len(applied.window.similarity) == 8


# -- choosing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "number"), [(0.0, 0), (0.25, 4), (0.5, 8), (0.3, 5)])
def test_a_ratio_is_of_all_sublayers(stats, ratio, number):
    assert AdaSkip(skip_ratio=ratio).choose(stats).count == number


@pytest.mark.parametrize(("speedup", "number"), [(1.0, 0), (4 / 3, 4), (2.0, 8), (1.05, 1)])
def test_a_target_speed_up_is_reached(stats, speedup, number):
    assert AdaSkip(target_speedup=speedup).choose(stats).count == number


def test_costs_turn_the_choice(stats):
    short = SublayerCosts((1.0,) * 8, (50.0,) * 8, rest_ms=1.0, tokens=64)
    long = SublayerCosts((50.0,) * 8, (1.0,) * 8, rest_ms=1.0, tokens=100_000)
    settings = AdaSkip(target_speedup=1.2, cost_aware=True)
    mlps, attns = settings.choose(stats, short), settings.choose(stats, long)
    assert (len(mlps.attn), len(attns.mlp)) == (0, 0) and mlps.mlp and attns.attn
    for chosen, costs in ((mlps, short), (attns, long)):
        saved = sum(costs.attn_ms[i] for i in chosen.attn) + sum(costs.mlp_ms[i] for i in chosen.mlp)
        assert costs.total_ms / (costs.total_ms - saved) >= 1.2


def test_cost_aware_measures_the_model_itself(golden, model, stats):
    with AdaSkip(skip_ratio=0.3, cost_aware=True).apply(model, stats) as applied:
        assert applied.costs.tokens == round(stats.tokens) and applied.plan.attn + applied.plan.mlp
    with AdaSkip(skip_ratio=0.3, cost_aware=True).apply(model) as applied:
        generate(model, golden["prompt"], 3)
        assert applied.costs.tokens == len(golden["prompt"]) and applied.statistics.requests == 1


def test_without_compensation_the_sublayers_are_left_out_and_nothing_else(golden, model, stats):
    with AdaSkip(count=6, compensate=False, online=False).apply(model, stats) as applied, torch.no_grad():
        plan = applied.plan
        scores = model(torch.tensor([golden["prompt"]]), use_cache=False).logits
    oracle = copy.deepcopy(model)
    for i in plan.attn:
        oracle.model.layers[i].self_attn.o_proj.weight.data.zero_()
    for i in plan.mlp:
        oracle.model.layers[i].mlp.down_proj.weight.data.zero_()
    with torch.no_grad():
        assert torch.equal(scores, oracle(torch.tensor([golden["prompt"]]), use_cache=False).logits)


def test_a_count_of_zero_changes_nothing(golden, model, stats):
    plain, plain_scores, _ = generate(model, golden["prompt"], 6)
    with AdaSkip(count=0).apply(model, stats):
        tokens, scores, _ = generate(model, golden["prompt"], 6)
    assert torch.equal(tokens, plain) and torch.equal(scores, plain_scores)


def test_settings_round_trip():
    settings = AdaSkip(target_speedup=1.3, phase="decode", cost_aware=True, part="mlp", window=8)
    assert AdaSkip.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of"),
        ({"count": 1, "skip_ratio": 0.5}, "exactly one of"),
        ({"skip_ratio": 1.0}, "below 1"),
        ({"skip_ratio": math.nan}, "below 1"),
        ({"count": -1}, "at least 0"),
        ({"count": 2.0}, "at least 0"),
        ({"target_speedup": 0.5}, "at least 1"),
        ({"count": 1, "phase": "all"}, '"prefill", "decode" or "both"'),
        ({"count": 1, "part": "norm"}, '"both", "attn" or "mlp"'),
        ({"count": 1, "window": 0}, "at least 1 pass"),
        ({"count": 1, "online": "false"}, "online as True or False"),
        ({"count": 1, "reference_compat": True, "cost_aware": True}, "published code"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(SkipError, match=message):
        AdaSkip(**settings)


def test_wrong_use_leaves_the_model_alone(golden, model, stats):
    before = {name: set(m.__dict__) for name, m in model.named_modules()}
    with pytest.raises(SkipError, match=r"whole number from 0 to 16"):
        AdaSkip(count=17).apply(model, stats)
    with pytest.raises(SkipError, match="16 sublayers"):
        AdaSkip(count=17).apply(model)
    with pytest.raises(SkipError, match="every attention"):
        AdaSkip(count=8, part="attn").apply(model, stats)
    with pytest.raises(SkipError, match="of 1 layers"):
        AdaSkip(count=1).apply(model, SublayerStats((0.9,), (0.9,), (1.0,), (1.0,)))
    with pytest.raises(SkipError, match="no request was measured"):
        AdaSkip.calibrate(model, [])
    with pytest.raises(SkipError, match="token ids"):
        AdaSkip.calibrate(model, [torch.rand(1, 4)])
    with pytest.raises(SkipError, match="input_ids"):
        AdaSkip.calibrate(model, [{"ids": torch.ones(1, 4)}])
    with pytest.raises(SkipError, match="a list of batches of token ids; got dict"):
        AdaSkip.calibrate(model, {"input_ids": torch.ones(1, 4, dtype=torch.long)})
    for words in ("no tokens", [[1, 2, 3], [1, 2]]):
        with pytest.raises(SkipError, match="tokenized, and padded"):
            AdaSkip.calibrate(model, [words])
    with pytest.raises(SkipError, match=r"attention_mask like the token ids, \(1, 4\); got \(1, 3\)"):
        AdaSkip.calibrate(model, [{"input_ids": [1, 2, 3, 4], "attention_mask": [1, 1, 1]}])
    with pytest.raises(SkipError, match="expected SublayerStats"):
        AdaSkip(count=1).apply(model, stats.to_dict())
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == before


def test_statistics_of_another_class_of_model_are_used_with_a_warning(model, stats, caplog):
    with AdaSkip(count=1).apply(model, replace(stats, model="Qwen3ForCausalLM")):
        assert "measured on a Qwen3ForCausalLM, and are used on a LlamaForCausalLM" in caplog.text


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


def test_parallel_layers_have_no_scale():
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    phi = PhiForCausalLM(
        PhiConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
    ).eval()
    prompt = list(range(1, 17))
    with pytest.raises(SkipError, match="compensate=False"):
        AdaSkip(count=2).apply(phi)
    with AdaSkip(count=2, compensate=False).apply(phi) as applied:
        generate(phi, prompt, 4)
        assert applied.statistics.num_layers == 4 and applied.stats.skipped_fraction > 0


def test_a_cache_of_another_plan_is_refused(golden, model, stats):
    cache = DynamicCache()
    with AdaSkip(count=2).apply(model, stats), torch.no_grad():
        model(torch.tensor([golden["prompt"]]), **{CACHE: cache})
    with AdaSkip(count=4).apply(model, stats), torch.no_grad(), pytest.raises(SkipError, match="another plan"):
        model(torch.tensor([[5]]), **{CACHE: cache})


# -- the device --------------------------------------------------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Counts the reads of single numbers from the device: each would wait for it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_measuring_waits_for_nothing(golden, model, stats):
    ids = torch.tensor([golden["prompt"]])
    meter, window = RequestMeter(8), OnlineWindow(20, 8, range(8))
    with torch.no_grad():
        model(ids)
        with HostReads() as plain:
            model(ids)
        with watch(model, meter.entering()), HostReads() as prefill:
            model(ids)
        with watch(model, window.enter), HostReads() as decode:
            model(ids[:, :1])
    assert meter.measured("mlp") == list(range(8))
    assert prefill.count == decode.count == plain.count


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_as_on_the_cpu(golden, model, stats):
    moved = copy.deepcopy(model).cuda()
    there = AdaSkip.calibrate(moved, golden["warmup_ids"])
    assert there.attn_similarity == pytest.approx(stats.attn_similarity, abs=1e-5)
    assert there.ranking() == stats.ranking()
    case = golden["cases"]["decode_N4"]
    with settings_of(case).apply(moved, there), torch.no_grad():
        out = moved.generate(torch.tensor([golden["prompt"]]).cuda(), max_new_tokens=32, do_sample=False)
    assert out[0, len(golden["prompt"]) :].tolist() == case["tokens"]
