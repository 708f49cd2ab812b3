"""Settings of the language model side: numbers of NumPy and torch are numbers, and what is none is refused."""

import json

import numpy as np
import pytest
import torch
from helpers.llm_zoo import BY_NAME, prompt

from skipguide.errors import SkipError
from skipguide.llm import AdaSkip, SelfSpeculative, SublayerPlan, SublayerStats, UnifiedSkip, unified_layers
from skipguide.llm.choose import most_similar
from skipguide.llm.cost import SublayerCosts, measure_costs

STATS = SublayerStats((0.9, 0.99), (0.8, 0.95), (1.1, 1.0), (1.2, 1.0))
COSTS = {"attn_ms": (1.0,), "mlp_ms": (2.0,)}


@pytest.mark.parametrize(
    ("made", "plain"),
    [
        (AdaSkip(skip_ratio=np.float32(0.25)), AdaSkip(skip_ratio=0.25)),
        (AdaSkip(count=np.int64(2), window=np.int32(5)), AdaSkip(count=2, window=5)),
        (AdaSkip(count=torch.tensor(2), online=np.bool_(False)), AdaSkip(count=2, online=False)),
        (AdaSkip(target_speedup=np.float32(1.5)), AdaSkip(target_speedup=1.5)),
        (UnifiedSkip(speedup=np.int64(2)), UnifiedSkip(speedup=2)),
        (SelfSpeculative(draft_skip=np.float32(0.5), max_draft=np.int64(3)), SelfSpeculative(max_draft=3)),
        (
            SublayerCosts(**COSTS, rest_ms=np.float32(1), tokens=np.int64(8)),
            SublayerCosts(**COSTS, rest_ms=1.0, tokens=8),
        ),
    ],
)
def test_numbers_of_any_library_are_kept_as_pythons(made, plain):
    assert made == plain and repr(made) == repr(plain)
    assert type(made).from_dict(json.loads(json.dumps(made.to_dict()))) == plain


def test_numbers_of_any_library_as_arguments():
    assert unified_layers(np.int64(12), np.float32(2)) == unified_layers(12, 2) == UnifiedSkip().layers(np.int32(12))
    assert UnifiedSkip().realised_speedup(np.int64(12)) == 2.0
    assert most_similar(STATS.attn_similarity, STATS.mlp_similarity, np.int64(1)).attn == (1,)
    assert measure_costs(BY_NAME["llama"].build(), np.int64(8), repeats=np.int32(1)).tokens == 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaSkip(skip_ratio=np.float32("nan")), "skip_ratio"),
        (lambda: AdaSkip(skip_ratio=torch.ones(2) / 4), "skip_ratio"),
        (lambda: AdaSkip(count=2.0), "count"),
        (lambda: AdaSkip(count=np.True_), "count"),
        (lambda: AdaSkip(count=2, online=1), "online as True or False"),
        (lambda: AdaSkip(count=2).plan(None), "expected SublayerStats, as of AdaSkip.calibrate.*got NoneType"),
        (lambda: UnifiedSkip(speedup=np.float32(0.5)), "speedup as a finite number of at least 1"),
        (lambda: unified_layers(np.float64(12), 2), "num_layers as a whole number"),
        (lambda: SelfSpeculative(draft_skip=np.float32(1)), "draft_skip"),
        (lambda: SelfSpeculative(adaptive="no"), "adaptive as True or False; got 'no'"),
        (lambda: SelfSpeculative(confidence_exit=None), "confidence_exit as True or False"),
        (lambda: SelfSpeculative.from_dict(None), "SelfSpeculative as a mapping"),
        (lambda: SelfSpeculative.from_dict([]), "SelfSpeculative as a mapping"),
        (lambda: SublayerCosts(**COSTS, rest_ms=True, tokens=8), "rest_ms"),
        (lambda: SublayerCosts(**COSTS, rest_ms=1, tokens="8"), "tokens as a whole number"),
        (lambda: measure_costs(BY_NAME["llama"].build(), "8"), "tokens as a whole number of at least 1; got '8'"),
        (lambda: measure_costs(BY_NAME["llama"].build(), 8, repeats=1.5), "repeats as a whole number"),
    ],
)
def test_what_is_no_setting_is_refused(make, message):
    with pytest.raises(SkipError, match=message):
        make()


def test_a_drafter_that_cannot_be_chosen_is_refused_before_anything_runs():
    model = BY_NAME["gemma3n"].build()
    with pytest.raises(SkipError, match=r"similarities of Gemma3nForCausalLM cannot be measured.*plan=SublayerPlan"):
        SelfSpeculative().apply(model)
    ids, spec = prompt(1, 6), SelfSpeculative(plan=SublayerPlan(mlp=[1]))
    assert torch.equal(
        spec.generate(model, ids, max_new_tokens=6, do_sample=False),
        model.generate(ids, max_new_tokens=6, do_sample=False),
    )


def test_a_ratio_too_small_for_one_sublayer_is_no_silent_nothing():
    with pytest.raises(SkipError, match=r"0\.1 leaves none of 4 sublayers out: ask for more than 0\.125"):
        AdaSkip(skip_ratio=0.1).apply(BY_NAME["llama"].build(num_hidden_layers=2), STATS)
    with pytest.raises(SkipError, match="leaves none of 8"):  # before a first request is measured
        AdaSkip(skip_ratio=0.01).apply(BY_NAME["llama"].build())
    assert AdaSkip(skip_ratio=0.0).plan(STATS).empty and AdaSkip(skip_ratio=0.13).choose(STATS).count == 1
