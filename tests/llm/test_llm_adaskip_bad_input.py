"""AdaSkip used wrongly: refused and named, and the model is as it was."""

from dataclasses import replace

import pytest
import torch
from helpers import adaskip_golden
from helpers.adaskip_golden import generate
from helpers.llm_zoo import CACHE
from transformers import DynamicCache

from skipguide.errors import SkipError
from skipguide.llm import AdaSkip, SublayerPlan, SublayerStats

golden, model, stats = adaskip_golden.golden, adaskip_golden.model, adaskip_golden.stats


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
