"""Self-speculative decoding keeps what generate promises: processors, criteria, streamers, scores."""

import math

import pytest
import torch
from helpers import drafting
from helpers.drafting import DRAFTS, prompt
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

models, llama = drafting.models, drafting.llama


class Banned(LogitsProcessor):
    """Forbids to repeat any of the last three tokens: it depends on the whole prefix."""

    def __call__(self, ids, scores):
        return scores.scatter(1, ids[:, -3:], -math.inf)


class StopsAt(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, ids, scores, **kwargs):
        return torch.full((len(ids),), ids.shape[1] >= self.length)


class Recorder:
    def __init__(self):
        self.put_calls, self.ended = [], 0

    def put(self, value):
        self.put_calls.append(value.tolist())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize(
    "call",
    [
        {"logits_processor": LogitsProcessorList([Banned()])},
        {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
        {"min_new_tokens": 7, "eos_token_id": list(range(1, 40))},
        {"stopping_criteria": StoppingCriteriaList([StopsAt(14)])},
        {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(10)])},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"max_length": 12, "max_new_tokens": None},
        {"prefill_chunk_size": 3},
    ],
    ids=lambda call: "-".join(call),
)
def test_processors_criteria_and_lengths(llama, call):
    call = {"max_new_tokens": 20, "do_sample": False} | call
    plain = llama.generate(prompt(3), **call)
    assert torch.equal(DRAFTS.generate(llama, prompt(3), **call), plain)


def test_the_end_inside_a_draft(llama):
    plain = llama.generate(prompt(2), max_new_tokens=20, do_sample=False)
    for eos in set(plain[0, prompt(2).shape[1] :].tolist()):
        ended = llama.generate(prompt(2), max_new_tokens=20, do_sample=False, eos_token_id=eos)
        assert torch.equal(
            DRAFTS.generate(llama, prompt(2), max_new_tokens=20, do_sample=False, eos_token_id=eos), ended
        )


def test_the_streamer_gets_what_plain_decoding_gives_it(llama):
    plain, drafted = Recorder(), Recorder()
    llama.generate(prompt(1), max_new_tokens=11, do_sample=False, streamer=plain)
    DRAFTS.generate(llama, prompt(1), max_new_tokens=11, do_sample=False, streamer=drafted)
    assert drafted.put_calls == plain.put_calls
    assert drafted.ended == plain.ended == 1


def test_scores_and_logits_are_returned(llama):
    call = {
        "do_sample": False, "return_dict_in_generate": True, "output_scores": True, "output_logits": True,
        "max_new_tokens": 10, "repetition_penalty": 1.3,
    }  # fmt: skip
    plain, drafted = llama.generate(prompt(1), **call), DRAFTS.generate(llama, prompt(1), **call)
    for name in ("scores", "logits"):
        assert len(plain[name]) == len(drafted[name]) == 10
        assert torch.allclose(torch.stack(plain[name]), torch.stack(drafted[name]), atol=1e-4)
