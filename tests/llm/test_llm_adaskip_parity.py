"""AdaSkip equals the published code: statistics, ranking, tokens, logits and caches."""

import json
import math

import pytest
import torch
from helpers import adaskip_golden
from helpers.adaskip_golden import GOLDEN, generate, lengths, settings_of
from safetensors.torch import load_file

from skipguide.llm import AdaSkip

golden, model, stats = adaskip_golden.golden, adaskip_golden.model, adaskip_golden.stats

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
