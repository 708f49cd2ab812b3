"""What self-speculative decoding refuses: models, ways of decoding, settings."""

import math

import pytest
import torch
from helpers import drafting
from helpers.drafting import DRAFTS, LAYERS, SETS, prompt, state
from helpers.llm_zoo import BY_NAME, CACHE
from transformers import GenerationConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from skipguide import SkipError
from skipguide.llm import AdaSkip, SelfSpeculative, SublayerPlan, SublayerStats
from skipguide.llm.cost import SublayerCosts

# Self-speculative decoding refuses what drafts do not go with, and leaves no trace.

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


# Ways of decoding that self-speculation does not know are refused, where it would decode greedily and say nothing.


@pytest.mark.parametrize(
    ("call", "mode"),
    [({"dola_layers": "low"}, "dola"), ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive")],
    ids=["dola", "contrastive"],
)
def test_modes_of_transformers_own_loops(llama, call, mode):
    before = state(llama)
    with pytest.raises(SkipError, match=f"does not go with .*{mode}"):
        DRAFTS.generate(llama, prompt(1), max_new_tokens=4, do_sample=False, **call)
    assert state(llama) == before


def test_a_second_one_is_refused_where_it_is_applied(llama):
    before = state(llama)
    with DRAFTS.apply(llama):
        with pytest.raises(SkipError, match="applied to this model already"):
            SelfSpeculative().apply(llama)
        drafted = llama.generate(prompt(1), max_new_tokens=8, do_sample=False)
    assert state(llama) == before
    assert torch.equal(drafted, llama.generate(prompt(1), max_new_tokens=8, do_sample=False))


def test_a_model_that_keeps_no_cache_by_itself_is_told_what_to_pass():
    model = BY_NAME["mpt"].build()
    model.generation_config.use_cache = False
    with pytest.raises(SkipError, match="needs use_cache=True"):
        SelfSpeculative().generate(model, prompt(1), max_new_tokens=4)


# Settings of self-speculative decoding: through a file and back, and refused where they mean nothing.


def test_json_round_trip(llama, tmp_path):
    stats = AdaSkip.calibrate(llama, [prompt(5), prompt(6)])
    spec = SelfSpeculative(stats=stats, costs=SublayerCosts((1.0,) * LAYERS, (2.0,) * LAYERS, 0.0, 64), max_draft=3)
    spec.save_json(tmp_path / "spec.json")
    assert SelfSpeculative.load_json(tmp_path / "spec.json") == spec
    DRAFTS.save_json(tmp_path / "drafts.json")
    assert SelfSpeculative.load_json(tmp_path / "drafts.json") == DRAFTS
    with spec.apply(llama) as applied:
        drafted = llama.generate(prompt(3), max_new_tokens=12, do_sample=False)
    assert torch.equal(drafted, llama.generate(prompt(3), max_new_tokens=12, do_sample=False))
    assert applied.stats.to_dict()["mlp"] == list(applied.stats.mlp)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"draft_skip": 0}, "draft_skip"),
        ({"draft_skip": 1.0}, "draft_skip"),
        ({"max_draft": 0}, "max_draft"),
        ({"draft_skip": "0.5"}, "draft_skip"),
        ({"plan": {"attn": [1]}}, "plan as a SublayerPlan"),
        ({"stats": {}}, "stats as a SublayerStats"),
        ({"plan": SublayerPlan()}, "leaves nothing out"),
        ({"plan": SETS["first"], "stats": SublayerStats((0.9,), (0.9,), (1.0,), (1.0,))}, "not both"),
    ],
)
def test_wrong_settings(wrong, expected):
    with pytest.raises(SkipError, match=expected):
        SelfSpeculative(**wrong)


def test_settings_for_another_model(llama):
    for wrong, expected in (
        ({"stats": SublayerStats((0.9,), (0.9,), (1.0,), (1.0,))}, "statistics are of a model of 1 layers"),
        ({"costs": SublayerCosts((1.0,), (1.0,), 0.0, 8)}, "costs are of a model of 1 layers"),
        ({"plan": SublayerPlan(attn=(99,))}, "layer 99 is out of range"),
        ({"plan": SublayerPlan(attn=range(LAYERS))}, "every attention"),
    ):
        with pytest.raises(SkipError, match=expected):
            SelfSpeculative(**wrong).apply(llama)
    with pytest.raises(SkipError, match="generate"):
        SelfSpeculative().apply(torch.nn.Linear(2, 2))
