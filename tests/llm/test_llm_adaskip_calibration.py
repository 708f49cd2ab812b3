"""AdaSkip's statistics: the same however a prompt comes, of the whole model only, and nothing is left."""

import math

import pytest
import torch
from helpers import adaskip_golden
from helpers.adaskip_golden import generate, lengths, padded

from skipguide.errors import SkipError
from skipguide.llm import AdaSkip, SublayerPlan
from skipguide.llm.cost import measure_costs

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
