"""Batches that a language model is measured on: what they may be, and what is said of those that are none."""

import numpy as np
import pytest
import torch
from helpers.llm_zoo import BY_NAME, VOCAB, left_padded, prompt

from skipguide.errors import SkipError
from skipguide.llm import AdaSkip, SelfSpeculative

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
