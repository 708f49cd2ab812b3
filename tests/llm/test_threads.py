"""Policies and the threads of streamers and servers: they hold everywhere where that is asked for, or it is said."""

import logging
import threading

import pytest
import torch
from helpers import llm_zoo
from helpers.residue import no_gates, traces
from transformers import TextIteratorStreamer

from skipguide import NoEffectError, SkipError, remove_from
from skipguide.llm import AdaSkip, SelfSpeculative, SublayerPlan, UnifiedSkip

LLAMA = llm_zoo.BY_NAME["llama"]
IDS = llm_zoo.prompt(batch=1, tokens=12)
GREEDY = {"max_new_tokens": 6, "do_sample": False}
POLICIES = {
    "plan": SublayerPlan(attn=[1], mlp=[1, 2]),
    "unified": UnifiedSkip(2.0, phase="both"),
    "adaskip": AdaSkip(count=3, online=False),
}


def in_thread(work):
    out = []
    thread = threading.Thread(target=lambda: out.append(work()))
    thread.start()
    thread.join(600)
    return out[0]


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_everywhere_is_in_a_streamers_thread_too(policy, caplog):
    model = LLAMA.build()
    before = traces(model)
    with policy.apply(model):
        model.generate(IDS, **GREEDY)
        here = model.generate(IDS, **GREEDY)
    with policy.apply(model, everywhere=True) as applied, caplog.at_level(logging.WARNING):
        in_thread(lambda: model.generate(IDS, **GREEDY))
        there = in_thread(lambda: model.generate(IDS, **GREEDY))
        assert applied.stats.skipped_fraction > 0
    assert torch.equal(here, there) and not torch.equal(here, model.generate(IDS, **GREEDY))
    assert "ran whole" not in caplog.text
    no_gates(model)
    model.__dict__.pop("_previous_max_cache_length", None)  # of transformers' generate
    assert traces(model) == before


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_the_first_pass_that_it_does_not_reach_is_said_at_once(policy, caplog):
    model = LLAMA.build()
    with pytest.raises(NoEffectError, match="everywhere=True"), policy.apply(model) as applied:
        for _ in range(2):
            in_thread(lambda: model.generate(IDS, **GREEDY))
            said = [record.message for record in caplog.records if "ran whole" in record.message]
            assert len(said) == 1 and "everywhere=True" in said[0] and "applied.running()" in said[0]
        assert applied.elsewhere == 12


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_what_the_error_names_is_there(policy, caplog):
    model = LLAMA.build()

    def work():
        with applied.running():
            return model.generate(IDS, **GREEDY)

    with policy.apply(model) as applied:
        first, second = in_thread(work), in_thread(work)
        assert torch.equal(second, model.generate(IDS, **GREEDY)) and applied.stats.passes >= 12
    assert not caplog.records and len(first) == 1
    with pytest.raises(SkipError, match="removed"):
        in_thread_raising(work)


def in_thread_raising(work):
    def safely():
        try:
            return work()
        except SkipError as error:
            return error

    raise in_thread(safely)


def test_drafts_are_no_reason_for_a_warning(caplog):
    """Around a drafter the whole model runs on purpose; `generate` drafts in whichever thread calls it."""
    model = LLAMA.build()
    plain = model.generate(IDS, **GREEDY)
    with SelfSpeculative(plan=SublayerPlan(mlp=[1, 2]), adaptive=False).apply(model) as applied:
        assert torch.equal(in_thread(lambda: model.generate(IDS, **GREEDY)), plain)
        assert torch.equal(model.generate(IDS, **GREEDY), plain)
    assert applied.stats.rounds > 1 and not caplog.records


def test_where_a_plan_holds_everywhere_another_thread_has_no_whole_model():
    """It could neither verify drafts with it nor measure it, and its own plan would end what holds everywhere."""
    model = LLAMA.build()
    SublayerPlan(mlp=[1]).apply(model, everywhere=True)
    for work, message in (
        (lambda: SelfSpeculative().generate(model, IDS, **GREEDY), "could not verify"),
        (lambda: AdaSkip.calibrate(model, [IDS]), "only the whole model can be measured"),
        (lambda: SublayerPlan(mlp=[2]).apply(model), "applied to this model already"),
    ):
        with pytest.raises(SkipError, match=message):
            in_thread_raising(work)
    remove_from(model)
    no_gates(model)


def test_a_text_iterator_streamer():
    model = LLAMA.build()

    class Words:
        def decode(self, tokens, **_):
            return " ".join(map(str, tokens))

    streamer = TextIteratorStreamer(Words(), skip_prompt=True)
    with UnifiedSkip(2.0, phase="both").apply(model, everywhere=True) as applied:
        thread = threading.Thread(target=model.generate, args=(IDS,), kwargs={**GREEDY, "streamer": streamer})
        thread.start()
        text = "".join(streamer)
        thread.join(600)
        assert applied.stats.passes == 6 and applied.stats.skipped_fraction == 0.5
        assert text.split() == list(map(str, model.generate(IDS, **GREEDY)[0, 12:].tolist()))
