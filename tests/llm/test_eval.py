"""The evaluation harness's adapter. The harness is no test requirement: a stub of its two modules stands in."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from skipguide import SkipError
from skipguide.llm import AdaSkip, SelfSpeculative, SublayerPlan, UnifiedSkip
from skipguide.llm.lm_eval import NAME, PolicyLM, load_policy, main, policy_among, register

IDS = torch.arange(1, 17)[None]


def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class StubHFLM:
    """What the adapter uses of the harness's HFLM."""

    def __init__(self, pretrained=None, device="cpu"):
        self.model, self.device = tiny(), device

    @torch.no_grad()
    def loglikelihood(self, requests, disable_tqdm=False):
        return [float(self.model(ids, use_cache=False).logits.log_softmax(-1)[0, -1, 0]) for ids in requests]

    loglikelihood_rolling = loglikelihood

    def generate_until(self, requests, disable_tqdm=False):
        return [self.model.generate(ids, max_new_tokens=4, do_sample=False).tolist() for ids in requests]


@pytest.fixture
def harness(monkeypatch):
    """A stub of lm_eval."""
    models = {}

    def register_model(name):
        return lambda cls: models.setdefault(name, cls)

    for name, content in {
        "lm_eval": {}, "lm_eval.api": {}, "lm_eval.api.registry": {"register_model": register_model},
        "lm_eval.models": {}, "lm_eval.models.huggingface": {"HFLM": StubHFLM},
    }.items():  # fmt: skip
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return models


def test_scores_and_texts_come_from_the_skipping_model():
    inner, plan = StubHFLM(), SublayerPlan(attn=[1, 2], mlp=[1, 2])
    lm = PolicyLM(inner, plan)
    whole = inner.loglikelihood([IDS])
    with plan.apply(inner.model):
        skipped = inner.loglikelihood([IDS])
        text = inner.generate_until([IDS])
    assert lm.loglikelihood([IDS]) == lm.loglikelihood_rolling([IDS]) == skipped != whole
    assert lm.generate_until([IDS], disable_tqdm=True) == text
    assert inner.loglikelihood([IDS]) == whole, "nothing is left on the model"
    assert lm.device == "cpu", "the rest is the inner model's"


def test_every_policy_runs():
    inner = StubHFLM()
    stats = AdaSkip.calibrate(inner.model, [IDS])
    whole = inner.generate_until([IDS])
    assert PolicyLM(inner, SelfSpeculative(plan=SublayerPlan(attn=[1]))).generate_until([IDS]) == whole
    assert PolicyLM(inner, SelfSpeculative()).loglikelihood([IDS]) == inner.loglikelihood([IDS])
    assert len(PolicyLM(inner, UnifiedSkip()).generate_until([IDS])) == 1
    assert PolicyLM(inner, AdaSkip(count=2), stats).loglikelihood([IDS]) != inner.loglikelihood([IDS])


def test_what_would_silently_do_nothing_is_refused():
    inner = StubHFLM()
    with pytest.raises(SkipError, match="leaves nothing out"):
        PolicyLM(inner, UnifiedSkip(phase="decode")).loglikelihood([IDS])
    with pytest.raises(SkipError, match="no prompt to measure on"):
        PolicyLM(inner, AdaSkip(count=2)).loglikelihood([IDS])
    with pytest.raises(SkipError, match=r"\.model"):
        PolicyLM(SimpleNamespace(), AdaSkip(count=2))


def test_policies_by_name(tmp_path):
    assert load_policy("adaskip", {"count": 3}) == AdaSkip(count=3)
    UnifiedSkip(1.5).save_json(tmp_path / "unified.json")
    assert load_policy("unified", tmp_path / "unified.json") == UnifiedSkip(1.5)
    for name, settings in (
        ("magic", None),
        ("unified", {"layers": 3}),
        ("unified", "{no"),
        ("unified", "missing.json"),
    ):
        with pytest.raises(SkipError):
            load_policy(name, settings)


def test_registration_with_the_harness(harness):
    assert register() is harness[NAME]
    lm = harness[NAME](policy="unified", policy_phase="both", pretrained="any")
    expected = PolicyLM(StubHFLM(), UnifiedSkip(phase="both"))
    assert lm.loglikelihood([IDS]) == expected.loglikelihood([IDS])
    assert lm.generate_until([IDS]) == expected.generate_until([IDS])


def cut_at_commas(text):
    """As the harness reads `model_args` that are one text."""
    return {key: value for key, _, value in (each.partition("=") for each in text.split(","))}


def test_settings_in_the_harnesss_arguments(tmp_path):
    stats = AdaSkip.calibrate(tiny(), [IDS])
    stats.save_json(tmp_path / "stats.json")
    given = cut_at_commas(f"pretrained=any,policy=adaskip,policy_phase=both,policy_stats={tmp_path / 'stats.json'}")
    assert policy_among(given | {"policy_count": 3}) == (AdaSkip(count=3), stats)
    given |= {"policy_settings": {"count": 2, "online": False}}
    with pytest.raises(SkipError, match=r"one by one \(phase\) or all in policy_settings"):
        policy_among(dict(given))
    del given["policy_phase"]
    assert policy_among(given) == (AdaSkip(count=2, online=False), stats)
    assert given == {"pretrained": "any"}, "the rest is the harness's"


@pytest.mark.parametrize("settings", ['{"speedup":1.5,"phase":"both"}', '{"speedup": 1.5, "phase": "both"}'])
def test_json_that_the_harness_cut_at_its_commas(settings):
    with pytest.raises(SkipError, match=r"policy_speedup=1\.5,policy_phase=both"):
        policy_among(cut_at_commas(f"pretrained=any,policy=unified,policy_settings={settings}"))


def test_the_harnesss_command_knows_the_model(harness, monkeypatch):
    """Its registry is of one process: `lm_eval run --model skipguide-hf` alone cannot find it."""
    command = ModuleType("lm_eval.__main__")
    command.cli_evaluate = lambda: called.append(NAME in harness)
    called = []
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", command)
    main()
    assert called == [True]


def test_without_the_harness(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SkipError, match=r"skipguide\[eval\]"):
        register()


def test_with_the_real_harness():
    pytest.importorskip("lm_eval", reason="the optional evaluation harness is not installed")
    assert register().__name__ == "SkippingHFLM"
