"""AdaSkip: its choice and its parity with the published code, on a device, its settings, and bad input."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import adaskip_golden
from helpers.adaskip_golden import GOLDEN, generate, lengths, settings_of
from helpers.llm_zoo import CACHE
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from skipguide.errors import SkipError
from skipguide.llm import AdaSkip, SublayerPlan, SublayerStats, watch
from skipguide.llm.cost import SublayerCosts
from skipguide.llm.online import OnlineWindow
from skipguide.llm.similarity import RequestMeter

pytestmark = pytest.mark.numerics

# AdaSkip's choice: as many sublayers as asked for, by what they cost, and left out exactly.

golden, model, stats = adaskip_golden.golden, adaskip_golden.model, adaskip_golden.stats


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


# AdaSkip equals the published code: statistics, ranking, tokens, logits and caches.

CASES = tuple(json.loads((GOLDEN / "adaskip_golden.json").read_text())["cases"])


@pytest.fixture(scope="module")
def logits():
    return load_file(GOLDEN / "adaskip_logits.safetensors")


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


def test_the_published_code_measures_twenty_requests_before_it_skips(golden, model, stats):
    with AdaSkip(count=4, reference_compat=True).apply(model) as applied, torch.no_grad():
        for prompt in golden["warmup_ids"]:
            assert applied.plan is None
            model(torch.tensor([prompt]))
        generate(model, golden["prompt"], 2)
        assert applied.statistics.attn_similarity == pytest.approx(stats.attn_similarity, abs=1e-7)
        assert applied.plan.attn == tuple(sorted(golden["cases"]["e2e_N4"]["skip_attn"]))


# AdaSkip on a device: measuring waits for nothing, and a GPU measures what the CPU does.


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


# AdaSkip's settings: through JSON and back, and refused where they mean nothing.


def test_settings_round_trip():
    settings = AdaSkip(target_speedup=1.3, phase="decode", cost_aware=True, part="mlp", window=8)
    assert AdaSkip.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of"),
        ({"count": 1, "skip_ratio": 0.5}, "exactly one of"),
        ({"skip_ratio": 1.0}, "below 1"),
        ({"skip_ratio": math.nan}, "skip_ratio as a finite number"),
        ({"count": -1}, "count as a whole number of at least 0"),
        ({"count": 2.0}, "count as a whole number of at least 0"),
        ({"target_speedup": 0.5}, "at least 1"),
        ({"count": 1, "phase": "all"}, '"prefill", "decode" or "both"'),
        ({"count": 1, "part": "norm"}, '"both", "attn" or "mlp"'),
        ({"count": 1, "window": 0}, "window as a whole number of at least 1"),
        ({"count": 1, "online": "false"}, "online as True or False"),
        ({"count": 1, "reference_compat": True, "cost_aware": True}, "published code"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(SkipError, match=message):
        AdaSkip(**settings)


# AdaSkip used wrongly: refused and named, and the model is as it was.


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


def test_a_cache_of_another_plan_is_refused(golden, model, stats):
    cache = DynamicCache()
    with AdaSkip(count=2).apply(model, stats), torch.no_grad():
        model(torch.tensor([golden["prompt"]]), **{CACHE: cache})
    with AdaSkip(count=4).apply(model, stats), torch.no_grad(), pytest.raises(SkipError, match="another plan"):
        model(torch.tensor([[5]]), **{CACHE: cache})
