"""Sets of sublayers to compare, and what they cost: against losses by hand."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from skipguide import SkipError
from skipguide.bench import language
from skipguide.bench.language import METHODS, Facts, counts_of, judge, measure, plans, rise
from skipguide.llm import AdaSkip, MeasuredSkip, SkipOrder, SublayerStats

LAYERS = 4


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    size = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": LAYERS}
    return LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2, num_key_value_heads=2)).eval()


@pytest.fixture(scope="module")
def pieces():
    return list(torch.randint(0, 40, (3, 1, 12), generator=torch.Generator().manual_seed(1)))


def stats(attn, mlp, block=()):
    ones = tuple(1.0 + n / 10 for n in range(len(attn)))
    return SublayerStats(tuple(attn), tuple(mlp), ones, ones, block_similarity=tuple(block))


ORDER = SkipOrder((2, 7), (1.0, 3.0), whole_loss=1.0, num_layers=4, alone=(8.0, 3.0, 1.0, 5.0, 2.0, 7.0, None, 4.0))
FACTS = Facts(stats([0.1, 0.9, 0.8, 0.2], [0.3, 0.7, 0.95, 0.0], [0.1, 0.4, 0.9, 0.2]), ORDER)


def chosen(name, count=2, facts=FACTS):
    method = next(method for method in METHODS if method.name == name)
    return [(plan.attn, plan.mlp) for plan in plans(method, facts, count)]


def test_sets_by_hand():
    assert chosen("AdaSkip") == [((1,), (2,))]
    assert chosen("attention only, scaled") == [((1, 2), ())]
    assert chosen("MeasuredSkip") == [((2,), (3,))], "attention of layer 2, then the MLP of layer 3"
    assert chosen("damage alone") == [((2,), (0,))]
    assert chosen("block influence") == [((2,), (2,))]
    assert chosen("late layers", 4) == [((2, 3), (2, 3))]
    assert chosen("Unified, balanced") == [((1,), (1,))]
    drawn = chosen("random, ends kept")
    assert len(drawn) == language.SEEDS
    assert all(set(attn) | set(mlp) <= {1, 2} for attn, mlp in drawn), "the first and the last layer stay"
    (scaled,) = plans(METHODS[0], FACTS, 2)
    assert (scaled.attn_scale, scaled.mlp_scale) == ({1: 1.1}, {2: 1.2})


def test_sets_that_there_are_not():
    assert chosen("attention only, scaled", 4) == [], "some attention has to stay"
    assert chosen("late layers", 3) == [], "half a layer is none"
    assert chosen("MeasuredSkip", 2, Facts(FACTS.stats)) == chosen("damage alone", 2, Facts(FACTS.stats)) == []
    assert chosen("MeasuredSkip", 3) == [], "the search went as far as two"
    assert chosen("damage alone", 8) == [], "one of them cannot go alone"
    assert chosen("block influence", 2, Facts(stats([0.1] * 4, [0.1] * 4))) == []
    assert chosen("random, ends kept", 6) == []
    assert counts_of(30) == (2, 4, 8, 14, 22)
    assert counts_of(4, (1 / 30, 1 / 15, 0.5)) == (2, 4)


@torch.no_grad()
def test_losses_are_those_of_the_model(model, pieces):
    losses, tops = judge(model, pieces)
    for ids, loss, top in zip(pieces, losses, tops, strict=True):
        logits = model(input_ids=ids).logits[0]
        by_hand = -logits[:-1].log_softmax(-1)[range(11), ids[0, 1:]].mean()
        assert loss == pytest.approx(float(by_hand), rel=1e-5)
        assert top.tolist() == logits[:-1].argmax(-1).tolist()
    with pytest.raises(SkipError, match="not finite"):
        judge(lambda **kw: type("O", (), {"logits": torch.full((1, 12, 40), math.nan)}), pieces)


@torch.no_grad()
def test_what_a_set_costs(model, pieces):
    method = next(method for method in METHODS if method.name == "late layers")
    whole = judge(model, pieces)
    found = measure(model, pieces, whole, method, FACTS, 2)
    assert found["left_out"] == [{"attn": [3], "mlp": [3]}]
    last = model.model.layers[-1]
    del model.model.layers[-1]
    try:
        assert found["losses"] == pytest.approx(judge(model, pieces)[0], rel=1e-5), "the model without its last layer"
    finally:
        model.model.layers.append(last)
    assert judge(model, pieces)[0] == whole[0], "and it is as it was"
    change = rise(found["losses"], whole[0])
    assert change.mean == pytest.approx(sum(found["losses"]) / 3 - sum(whole[0]) / 3, rel=1e-5)


def test_a_search_is_judged_as_it_was_made(model, pieces):
    facts = Facts(AdaSkip.calibrate(model, pieces), MeasuredSkip.calibrate(model, pieces[:1], most=2))
    method = next(method for method in METHODS if method.name == "MeasuredSkip")
    found = measure(model, pieces[:1], judge(model, pieces[:1]), method, facts, 2)
    assert found["losses"] == pytest.approx([facts.order.losses[-1]], rel=1e-5)


def test_what_cannot_be_had_is_said(model, pieces):
    whole = judge(model, pieces)
    found = measure(model, pieces, whole, next(m for m in METHODS if m.name == "late layers"), FACTS, 3)
    assert found == {"refused": "has no set of 3 sublayers on this model"}
