"""Applied: handles that were dropped are had back from what stands on a model or pipeline."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from skipguide import SkipError, Skipper, SkipPlan, applied_to, remove_from
from skipguide.llm import AdaSkip, SublayerPlan
from skipguide.pipelines import SpatiotemporalSkipGuidance
from skipguide.vision import LayerMask
from zoo.pipes import BY_PIPE


def language_model():
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes)).eval()


def test_guidance_of_a_pipeline_and_its_model():
    pipe, other = BY_PIPE["ltx"].build(), BY_PIPE["ltx"].build()
    other.transformer = pipe.transformer  # two pipelines share it
    settings = SpatiotemporalSkipGuidance(layers=[1])
    settings.apply(pipe)  # the handle is gone
    with pytest.raises(SkipError, match=r"skipguide\.remove_from\(pipe\)"):
        settings.apply(pipe)
    second = settings.apply(other)
    (found,) = applied_to(pipe)
    assert found.pipe is pipe and applied_to(other) == [second]
    assert applied_to(pipe.transformer) == [found, second]
    assert remove_from(pipe) == [found] and applied_to(pipe) == [] and applied_to(other) == [second]
    remove_from(pipe.transformer)
    assert "forward" not in pipe.transformer.__dict__


def test_sublayer_plans_masks_and_skippers():
    model = language_model()
    SublayerPlan(mlp=[1]).apply(model)
    with pytest.raises(SkipError, match=r"skipguide\.remove_from\(model\)"):
        SublayerPlan(mlp=[2]).apply(model)
    with Skipper(model, SkipPlan([0])) as skipper:
        first, second = applied_to(model)
        assert first.plan.mlp == (1,) and second is skipper
        assert remove_from(model) == [first, second]
    adaptive = AdaSkip(skip_ratio=0.3).apply(model)
    assert applied_to(model) == [adaptive]
    remove_from(model)
    assert all("forward" not in module.__dict__ for module in model.modules())
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    LayerMask(torch.ones(1, 8, 8, dtype=torch.bool)).apply(network)
    with pytest.raises(SkipError, match=r"skipguide\.remove_from\(model\)"):
        LayerMask(torch.ones(1, 8, 8, dtype=torch.bool)).apply(network)
    assert len(remove_from(network)) == 1 and applied_to(network) == []


def test_something_else():
    for target in (None, 3, object(), "pipe"):
        with pytest.raises(SkipError, match="expected a model, or a pipeline with models"):
            applied_to(target)
