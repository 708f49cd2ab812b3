"""Self-speculative decoding refuses what drafts do not go with, and leaves no trace."""

import math

import pytest
import torch
from helpers import drafting
from helpers.drafting import DRAFTS, SETS, prompt, state
from helpers.llm_zoo import CACHE
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
)

from skipguide import SkipError
from skipguide.llm import AdaSkip, SelfSpeculative

models, llama = drafting.models, drafting.llama


class Fails(LogitsProcessor):
    def __init__(self, at):
        self.at, self.calls = at, 0

    def __call__(self, ids, scores):
        self.calls += 1
        if self.calls == self.at:
            raise RuntimeError("no")
        return scores


@pytest.mark.parametrize("at", [1, 3, 6, 9])
def test_an_exception_inside_generate_leaves_no_trace(llama, at):
    before, plain = state(llama), llama.generate(prompt(1), max_new_tokens=12, do_sample=False)
    for spec in (DRAFTS, SelfSpeculative(max_draft=3)):
        with pytest.raises(RuntimeError, match="no"):
            spec.generate(
                llama, prompt(1), max_new_tokens=12, do_sample=False, logits_processor=LogitsProcessorList([Fails(at)])
            )
        assert state(llama) == before
        assert "generate" not in llama.__dict__
        assert torch.equal(llama.generate(prompt(1), max_new_tokens=12, do_sample=False), plain)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"use_cache": False}, "use_cache"),
        ({"cache_implementation": "static"}, "cannot"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"custom_generate": DRAFTS}, "call remove"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_drafting_does_not_go_with_is_refused(llama, call, expected):
    before = state(llama)
    with pytest.raises(SkipError, match=expected):
        DRAFTS.generate(llama, prompt(1), max_new_tokens=4, **{"do_sample": False} | call)
    assert state(llama) == before


def test_a_recurrent_model_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=16, state_size=4, num_hidden_layers=2))
    with pytest.raises(SkipError, match="recurrent"):
        SelfSpeculative().apply(model)


def test_a_model_with_sublayers_left_out_cannot_verify(llama):
    with SETS["first"].apply(llama), pytest.raises(SkipError, match="left out of this model already"):
        DRAFTS.generate(llama, prompt(1), max_new_tokens=4, do_sample=False)
    with SETS["first"].apply(llama):
        cache = llama.generate(prompt(1), max_new_tokens=4, return_dict_in_generate=True)[CACHE]
    with pytest.raises(SkipError, match="made with sublayers left out"):
        DRAFTS.generate(llama, prompt(1, 12), **{CACHE: cache}, max_new_tokens=4)
    with AdaSkip(count=1).apply(llama), pytest.raises(SkipError, match="left out of this model already"):
        DRAFTS.generate(llama, prompt(1), max_new_tokens=4, do_sample=False)


def test_stop_strings_in_a_generation_config_are_refused_wherever_it_is(llama):
    wrong = GenerationConfig(max_new_tokens=4, do_sample=False, stop_strings=["a"])
    with pytest.raises(SkipError, match="stop_strings"):
        DRAFTS.generate(llama, prompt(1), wrong, tokenizer=object())
    kept = llama.generation_config
    llama.generation_config = wrong
    try:
        with pytest.raises(SkipError, match="stop_strings"):
            DRAFTS.generate(llama, prompt(1), tokenizer=object())
    finally:
        llama.generation_config = kept


def test_nan_in_the_model_is_named(llama):
    model = LlamaForCausalLM(llama.config).eval()
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(SkipError, match="NaN or inf"):
        SelfSpeculative().generate(model, prompt(1), max_new_tokens=8, do_sample=False)
