"""AdaSkip's choice: as many sublayers as asked for, by what they cost, and left out exactly."""

import copy

import pytest
import torch
from helpers import adaskip_golden
from helpers.adaskip_golden import generate

from skipguide.errors import SkipError
from skipguide.llm import AdaSkip
from skipguide.llm.cost import SublayerCosts

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
