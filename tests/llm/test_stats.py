"""Sublayer statistics: laws, JSON, times, choices, and the batches that they are measured on."""

import json
import math

import numpy as np
import pytest
import torch
from helpers.llm_zoo import BY_NAME, VOCAB, left_padded, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from skipguide.errors import SkipError
from skipguide.llm import AdaSkip, SelfSpeculative
from skipguide.llm.choose import (
    Sublayers,
    late_layers,
    least_influential,
    least_per_millisecond,
    most_similar,
    random_sublayers,
    rank,
)
from skipguide.llm.cost import SublayerCosts, measure_costs
from skipguide.llm.similarity import RequestMeter, StatsMeter, SublayerStats

# Sublayer statistics, times and the choice of what to leave out: laws, JSON, bad input.

similarities = st.lists(st.floats(-1, 1), min_size=2, max_size=12)


def stats(layers=4, **changes):
    values = torch.linspace(0.9, 0.99, layers).tolist()
    lists = dict.fromkeys(("attn_similarity", "mlp_similarity", "attn_scale", "mlp_scale"), values)
    return SublayerStats(**(lists | changes))


def meter_of(*requests, parts=("attn", "mlp", "block"), layers=1):
    meter = StatsMeter(layers)
    for before, after, mask in requests:
        request = RequestMeter(layers)
        for part in parts:
            request.add(0, part, before, after, mask)
        meter.add(request)
    return meter


# -- statistics ------------------------------------------------------------------------------------------------------


def test_similarity_is_the_mean_cosine_and_scale_the_growth_of_the_norm():
    before, after = torch.randn(2, 1, 7, 5).unbind()
    result = meter_of((before, after, None)).result()
    assert result.attn_similarity[0] == pytest.approx(cosine_similarity(before, after, dim=2).mean().item(), abs=1e-6)
    assert result.mlp_scale[0] == pytest.approx((after.norm() / before.norm()).item(), rel=1e-6)


def test_padding_changes_nothing_whatever_is_in_it():
    before, after = torch.randn(2, 1, 7, 5).unbind()
    junk = torch.full((1, 3, 5), math.nan)
    mask = torch.tensor([[False] * 3 + [True] * 7])
    plain = meter_of((before, after, None)).result()
    padded = meter_of((torch.cat([junk, before], 1), torch.cat([junk, after], 1), mask)).result()
    assert padded.attn_similarity == pytest.approx(plain.attn_similarity, abs=1e-6)
    assert padded.attn_scale == pytest.approx(plain.attn_scale, abs=1e-6)


def test_a_batch_counts_as_its_requests_one_by_one():
    before, after = torch.randn(2, 3, 7, 5).unbind()
    together = meter_of((before, after, None)).result()
    apart = meter_of(*((before[i : i + 1], after[i : i + 1], None) for i in range(3))).result()
    assert together.requests == apart.requests == 3
    assert together.mlp_similarity == pytest.approx(apart.mlp_similarity, abs=1e-6)
    assert together.mlp_scale == pytest.approx(apart.mlp_scale, abs=1e-6)


def test_a_prompt_in_chunks_is_one_request():
    before, after = torch.randn(2, 2, 9, 5).unbind()
    whole, chunks = RequestMeter(1), RequestMeter(1)
    whole.add(0, "attn", before, after)
    for piece in (slice(0, 4), slice(4, 9)):
        chunks.add(0, "attn", before[:, piece], after[:, piece])
    assert torch.allclose(whole.similarity("attn"), chunks.similarity("attn"))
    assert torch.allclose(whole.scale("attn"), chunks.scale("attn"))


def test_half_precision_is_measured_in_float32():
    before, after = (1000 * torch.randn(2, 1, 7, 512)).half().unbind()  # squares of these overflow in half precision
    result = meter_of((before, after, None)).result()
    assert result.attn_scale[0] == pytest.approx((after.float().norm() / before.float().norm()).item(), rel=1e-4)


def test_nan_is_refused_with_its_place():
    before = torch.randn(1, 4, 5)
    with pytest.raises(SkipError, match=r"attn_similarity of layer 0 is nan.*NaN or inf"):
        meter_of((before, before * math.nan, None)).result()
    with pytest.raises(SkipError, match="mlp_scale of layer 2 is inf"):
        stats(mlp_scale=[1, 1, math.inf, 1])


def test_nothing_measured_is_refused():
    with pytest.raises(SkipError, match="no request was measured"):
        StatsMeter(2).result()
    with pytest.raises(SkipError, match="nothing was measured"):
        RequestMeter(2).similarity("attn")


def test_json_round_trip_and_its_refusals(tmp_path):
    found = stats(requests=20, model="LlamaForCausalLM")
    found.save_json(tmp_path / "stats.json")
    assert SublayerStats.load_json(tmp_path / "stats.json") == found
    with pytest.raises(SkipError, match="exists"):
        found.save_json(tmp_path / "stats.json")
    data = json.loads((tmp_path / "stats.json").read_text())
    with pytest.raises(SkipError, match="unknown keys"):
        SublayerStats.from_dict(data | {"colour": 1})
    with pytest.raises(SkipError, match=r"needs \['attn_scale', 'mlp_scale'\] too"):
        SublayerStats.from_dict({k: v for k, v in data.items() if "scale" not in k})
    with pytest.raises(SkipError, match="as a mapping of its settings; got list"):
        SublayerStats.from_dict([data])
    with pytest.raises(SkipError, match="one value per layer"):
        SublayerStats.from_dict(data | {"mlp_scale": [1.0]})
    with pytest.raises(SkipError, match="list of numbers"):
        SublayerStats.from_dict(data | {"mlp_scale": ["a", "b", "c", "d"]})


# -- choices ---------------------------------------------------------------------------------------------------------


@given(similarities, st.data())
def test_ranking_is_a_stable_descending_order(attn, data):
    mlp = data.draw(st.lists(st.floats(-1, 1), min_size=len(attn), max_size=len(attn)))
    order, both = rank(attn, mlp), [*attn, *mlp]
    assert sorted(order) == list(range(len(both)))
    pairs = [(-both[n], n) for n in order]
    assert pairs == sorted(pairs)


@given(similarities, st.data())
def test_sets_grow_with_their_count(attn, data):
    mlp = data.draw(st.lists(st.floats(-1, 1), min_size=len(attn), max_size=len(attn)))
    for part in ("both", "attn", "mlp"):
        previous: set = set()
        for count in range(len(attn) + 1):
            found = most_similar(attn, mlp, count, part)
            now = {("attn", n) for n in found.attn} | {("mlp", n) for n in found.mlp}
            assert found.count == count and previous <= now
            previous = now


@settings(max_examples=50)
@given(similarities, st.floats(0.1, 10), st.floats(0, 0.95))
def test_the_share_of_time_is_reached_and_nothing_in_it_is_superfluous(attn, ratio, share):
    mlp, attn_ms, mlp_ms = attn[::-1], [1.0] * len(attn), [ratio] * len(attn)
    found = least_per_millisecond(attn, mlp, attn_ms, mlp_ms, share=share)
    times = [1.0] * len(found.attn) + [ratio] * len(found.mlp)
    goal = share * (1 + ratio) * len(attn)
    assert sum(times) >= goal - 1e-6
    assert all(sum(times) - one < goal + 1e-6 for one in times)


def test_what_later_ones_made_unnecessary_is_put_back_the_most_harmful_first():
    """12 ms of 15 are to be saved: the first three by damage per ms save 14, and one of the two small ones may stay."""
    found = least_per_millisecond([0.9, 0.7], [-1.0, -1.0], [2, 2], [10, 1], share=0.8)
    assert (found.attn, found.mlp) == ((0,), (0,))


def test_costs_decide_between_equals():
    similar = [0.9, 0.9]
    dear_mlp = least_per_millisecond(similar, similar, [1, 1], [3, 3], count=1)
    dear_attn = least_per_millisecond(similar, similar, [3, 3], [1, 1], count=1)
    assert (dear_mlp, dear_attn) == (Sublayers(mlp=(0,)), Sublayers(attn=(0,)))


def test_baselines():
    assert late_layers(6, 2) == Sublayers((4, 5), (4, 5))
    assert least_influential([0.1, 0.9, 0.5], 2) == Sublayers((1, 2), (1, 2))
    sets = {random_sublayers(12, 6, seed) for seed in range(5)}
    assert len(sets) == 5 and all(found.count == 6 for found in sets)


def test_a_set_is_a_plan():
    plan = Sublayers((1, 3), (2,)).plan()
    assert {(term.part, term.layers) for term in plan.terms} == {("attn", (1, 3)), ("mlp", (2,))}


@pytest.mark.parametrize("count", [-1, 5, 1.5, True])
def test_a_wrong_count_is_refused(count):
    with pytest.raises(SkipError, match="whole number"):
        most_similar([0.5, 0.6], [0.7, 0.8], count)


def test_wrong_choices_are_refused():
    similar = [0.9, 0.9]
    with pytest.raises(SkipError, match='part "both"'):
        most_similar(similar, similar, 1, part="norm")
    with pytest.raises(SkipError, match="save 50% of the time; 60% was asked"):
        least_per_millisecond(similar, similar, [1, 1], [1, 1], share=0.6, part="attn")
    with pytest.raises(SkipError, match="above 0 ms"):
        least_per_millisecond(similar, similar, [0, 1], [1, 1], count=1)
    with pytest.raises(SkipError, match="sublayers from 0 to 3"):
        Sublayers.numbered([4], 2)


# -- costs -----------------------------------------------------------------------------------------------------------


def test_costs_are_measured_per_sublayer_and_leave_no_hook(tiny_llama):
    before = {name: (len(m._forward_hooks), set(m.__dict__)) for name, m in tiny_llama.named_modules()}
    for phase in ("prefill", "decode"):
        costs = measure_costs(tiny_llama, 16, phase, repeats=2)
        assert len(costs.attn_ms) == len(costs.mlp_ms) == len(tiny_llama.model.layers)
        assert costs.total_ms >= costs.sublayers_ms > 0
        assert SublayerCosts.from_dict(costs.to_dict()) == costs
    assert {name: (len(m._forward_hooks), set(m.__dict__)) for name, m in tiny_llama.named_modules()} == before


def test_a_speed_up_beyond_the_limit_is_refused():
    costs = SublayerCosts((1.0, 1.0), (3.0, 3.0), rest_ms=2.0, tokens=512)
    assert costs.share_for(1.0) == 0.0
    with pytest.raises(SkipError, match=r"below 5\.00x"):
        costs.share_for(5.0)
    with pytest.raises(SkipError, match='"prefill" or "decode"'):
        measure_costs(torch.nn.Linear(1, 1), 8, phase="both")
    with pytest.raises(SkipError, match="above 0 ms"):
        SublayerCosts((0.0,), (1.0,), 1.0, 8)
    for wrong in (("a",), None):
        with pytest.raises(SkipError, match="attn_ms as a list of numbers"):
            SublayerCosts(wrong, (1.0,), 1.0, 8)
    for rest in (math.nan, -1.0, None):
        with pytest.raises(SkipError, match="rest_ms as a finite number of at least 0"):
            SublayerCosts((1.0,), (1.0,), rest, 8)


def test_times_of_decoding_are_measured_up_to_the_last_position():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)).train()
    model.transformer.h[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert measure_costs(model, 16, "decode", repeats=2).tokens == 16
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.fixture(scope="module")
def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


# Batches that a language model is measured on: what they may be, and what is said of those that are none.

IDS = prompt(2, 9)
FIELDS = ("attn_similarity", "mlp_similarity", "attn_scale", "mlp_scale", "block_similarity")


@pytest.fixture(scope="module")
def model():
    return BY_NAME["llama"].build()


def numbers(stats):
    return torch.tensor([getattr(stats, name) for name in FIELDS], dtype=torch.float64)


@pytest.mark.parametrize(
    "given", [IDS.tolist(), IDS.numpy(), IDS.numpy().astype(np.uint8), IDS.int(), {"input_ids": IDS}]
)
def test_ids_of_every_kind_are_the_same_batch(model, given):
    assert AdaSkip.calibrate(model, [given]) == AdaSkip.calibrate(model, [IDS])


def test_ids_outside_the_vocabulary_are_named_with_their_batch(model):
    beyond = IDS.clone()
    beyond[1, 4] = VOCAB + 6
    with pytest.raises(SkipError, match=rf"from 0 to {VOCAB - 1}.*batch 2 has {VOCAB + 6}, first in row 1 at token 4"):
        AdaSkip.calibrate(model, [IDS, IDS, beyond])
    with pytest.raises(SkipError, match="batch 0 has -100, first in row 0 at token 0"):
        AdaSkip.calibrate(model, [torch.full((1, 3), -100)])
    with pytest.raises(SkipError, match="1000, 1001, 1002, 1003, 1004 and 4 more"):
        AdaSkip.calibrate(model, [torch.arange(1000, 1009)])


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (5, "list of batches of token ids; got int"),
        ([IDS > 3], "of torch.bool as batch 0"),
        ([IDS, IDS[:0]], r"got \(0, 9\) of torch.int64 as batch 1"),
        ([IDS, "text"], "got 'text' as batch 1"),
        ([IDS, {"ids": IDS}], r"it has \[\'ids\'\] \(batch 1\)"),
        ([{"input_ids": IDS, "attention_mask": torch.ones(2, 3)}], r"got \(2, 3\) in batch 0"),
    ],
)
def test_what_is_no_batch(model, batches, message):
    with pytest.raises(SkipError, match=message):
        AdaSkip.calibrate(model, batches)


def test_a_row_of_nothing_but_padding_is_no_request(model):
    ids, mask = left_padded(2, 9)
    padded = {"input_ids": torch.cat([ids, ids[:1] * 0]), "attention_mask": torch.cat([mask, mask[:1] * 0])}
    found, expected = (AdaSkip.calibrate(model, [b]) for b in (padded, {"input_ids": ids, "attention_mask": mask}))
    assert (found.requests, found.tokens) == (expected.requests, expected.tokens) == (2, 7.5)
    assert torch.allclose(numbers(found), numbers(expected), atol=1e-6)
    with pytest.raises(SkipError, match="not all of them masked"):
        AdaSkip.calibrate(model, [{"input_ids": ids, "attention_mask": mask * 0}])


def test_a_row_of_nothing_but_padding_does_not_stop_a_request(model):
    ids, mask = left_padded(2, 9)
    inputs = {"input_ids": torch.cat([ids, ids[:1] * 0]), "attention_mask": torch.cat([mask, mask[:1] * 0])}
    call = {"max_new_tokens": 8, "do_sample": False}
    plain = model.generate(**inputs, **call)
    assert torch.equal(SelfSpeculative().generate(model, **inputs, **call)[:2], plain[:2])
    with AdaSkip(count=2).apply(model) as applied:
        model.generate(**inputs, **call)
        assert applied.statistics.requests == 2


def test_calibration_stops_after_so_many_requests(model):
    batches = [prompt(3, 6 + i, seed=i) for i in range(9)]
    first = AdaSkip.calibrate(model, iter(batches), requests=np.int64(20))
    assert first == AdaSkip.calibrate(model, [*batches[:6], batches[6][:2]]) and first.requests == 20
    assert AdaSkip.calibrate(model, batches).requests == 27
    with pytest.raises(SkipError, match="requests as a whole number of at least 1; got 0"):
        AdaSkip.calibrate(model, batches, requests=0)


def test_a_text_beyond_the_last_position_is_named():
    short = BY_NAME["gpt2"].build(n_positions=16)
    with pytest.raises(SkipError, match="batch 1 of 20 tokens is longer than the positions of GPT2LMHeadModel"):
        AdaSkip.calibrate(short, [prompt(1, 16), prompt(1, 20)])
    assert AdaSkip.calibrate(short, [prompt(1, 16)]).requests == 1
