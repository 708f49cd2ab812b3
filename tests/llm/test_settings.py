"""Settings of the language model side: numbers of any library, and a clear error for what means nothing."""

import json

import numpy as np
import pytest
import torch
import transformers
from helpers import llm_zoo
from helpers.llm_zoo import BY_NAME, CACHE, prompt
from helpers.residue import no_gates, traces
from torch import nn

from skipguide import UnknownBlockError, find_blocks
from skipguide.errors import SkipError
from skipguide.llm import (
    AdaSkip,
    SelfSpeculative,
    SublayerPlan,
    SublayerStats,
    UnifiedSkip,
    sublayer_map,
    unified_layers,
    watch,
)
from skipguide.llm.choose import most_similar
from skipguide.llm.cost import SublayerCosts, measure_costs

# Settings of the language model side: numbers of NumPy and torch are numbers, and what is none is refused.

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


def test_sliding_windows_of_an_older_transformers_are_refused(monkeypatch):
    model = BY_NAME["gemma2"].build()
    monkeypatch.setattr("transformers.__version__", "5.22.2")
    with pytest.raises(SkipError, match=r"sliding windows needs transformers 5.23 or newer \(here 5.22.2\)"):
        SelfSpeculative(plan=SublayerPlan(mlp=[1])).generate(model, prompt(1, 6), max_new_tokens=6, do_sample=False)


def test_a_ratio_too_small_for_one_sublayer_is_no_silent_nothing():
    with pytest.raises(SkipError, match=r"0\.1 leaves none of 4 sublayers out: ask for more than 0\.125"):
        AdaSkip(skip_ratio=0.1).apply(BY_NAME["llama"].build(num_hidden_layers=2), STATS)
    with pytest.raises(SkipError, match="leaves none of 8"):  # before a first request is measured
        AdaSkip(skip_ratio=0.01).apply(BY_NAME["llama"].build())
    assert AdaSkip(skip_ratio=0.0).plan(STATS).empty and AdaSkip(skip_ratio=0.13).choose(STATS).count == 1


# Bad input to sublayer skipping: each a clear error, and the model as it was.

LLAMA = llm_zoo.BY_NAME["llama"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attn": [1, 1]}, "twice"),
        ({"mlp": [0.5]}, "whole numbers"),
        ({"attn": [True]}, "whole numbers"),
        ({"attn": None}, "block numbers, one or several; got None"),
        ({"phase": "always"}, "unknown phase 'always'"),
        ({"attn": [1], "attn_scale": None}, "mapping of layers to factors"),
        ({"attn": [1], "attn_scale": [1.5]}, "mapping of layers to factors"),
        ({"attn": [1], "attn_scale": {1: "a"}}, "attn_scale of layer 1 is 'a'"),
        ({"attn": [1], "attn_scale": {"1": 1.5}}, "whole numbers from 0.; got '1'"),
        ({"attn": [1], "attn_scale": {1: float("nan")}}, "attn_scale of layer 1 is nan"),
        ({"mlp": [1], "mlp_scale": {1: float("inf")}}, "finite positive"),
        ({"mlp": [1], "mlp_scale": {1: 0.0}}, "finite positive"),
        ({"mlp": [1], "mlp_scale": {1: -1.0}}, "finite positive"),
        ({"mlp": [1], "mlp_scale": {2: 1.0}}, "layer 2, whose mlp is not left out"),
    ],
)
def test_plans_that_cannot_be(settings, message):
    with pytest.raises(SkipError, match=message):
        SublayerPlan(**settings)


def test_plans_as_json(tmp_path):
    plan = SublayerPlan(attn=[3, 1], mlp=[2], attn_scale={3: 1.5, 1: 0.9}, phase="decode")
    assert plan.attn == (1, 3) and plan == SublayerPlan((1, 3), (2,), {1: 0.9, 3: 1.5}, phase="decode")
    plan.save_json(tmp_path / "plan.json")
    assert SublayerPlan.load_json(tmp_path / "plan.json") == plan
    assert hash(SublayerPlan.from_dict(json.loads(json.dumps(plan.to_dict())))) == hash(plan)
    with pytest.raises(SkipError, match="unknown keys"):
        SublayerPlan.from_dict(plan.to_dict() | {"layers": []})
    for scales in (None, [1.5], {"1": 1.5}):
        with pytest.raises(SkipError):
            SublayerPlan.from_dict(plan.to_dict() | {"attn_scale": scales})
    with pytest.raises(SkipError, match="as a mapping of its settings; got list"):
        SublayerPlan.from_dict([1])
    assert SublayerPlan().empty and not plan.empty


@pytest.mark.parametrize(
    ("name", "plan", "message"),
    [
        ("llama", SublayerPlan(attn=[4]), "attn of layer 4 is out of range: LlamaForCausalLM has 4 layers, 0 to 3"),
        ("llama", SublayerPlan(mlp=[-1]), "out of range"),
        ("llama", SublayerPlan(attn=[0, 1, 2, 3]), "every attention .* cached=False"),
        ("phi", SublayerPlan(mlp=[1], mlp_scale={1: 1.1}), "in parallel"),
        ("gptneox_parallel", SublayerPlan(attn=[1], attn_scale={1: 1.1}), "scale per sublayer is not defined"),
        ("opt_postnorm", SublayerPlan(attn=[1], attn_scale={1: 1.1}), "scale per sublayer is not defined"),
        ("gemma3n", SublayerPlan(attn=[2]), "later layers of Gemma3nForCausalLM read its keys"),
        ("gemma3n", SublayerPlan(attn=[3]), "shared KV cache"),
        ("gemma4", SublayerPlan(attn=[3]), "shared KV cache"),
    ],
)
def test_plans_that_do_not_fit_the_model(name, plan, message):
    model = llm_zoo.BY_NAME[name].build()
    before = traces(model)
    with pytest.raises(SkipError, match=message):
        plan.apply(model)
    assert traces(model) == before
    no_gates(model)


def test_every_attention_left_out_needs_the_promise_that_no_cache_is_used():
    model = LLAMA.build()
    ids = llm_zoo.prompt()
    plan = SublayerPlan(attn=range(4))
    with plan.apply(model, cached=False):
        out = model(ids, use_cache=False).logits
        with pytest.raises(SkipError, match="pass use_cache=False"):
            model.generate(ids, max_new_tokens=2)
        with pytest.raises(SkipError, match="use_cache=False"):
            model(ids, use_cache=True)
    assert torch.equal(out, LLAMA.zeroed(model, range(4))(ids, use_cache=False).logits)


def test_the_skip_set_changed_in_the_middle_of_a_sequence():
    model = LLAMA.build()
    ids = llm_zoo.prompt()
    with SublayerPlan(attn=[1]).apply(model):
        cache = model(ids, use_cache=True)[CACHE]
    with SublayerPlan(attn=[1, 2]).apply(model), pytest.raises(SkipError, match="another plan"):
        model(ids[:, :1], **{CACHE: cache})
    assert int(cache.get_seq_length()) == 7


TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
RECURRENT = {
    "Mamba": TINY,
    "Jamba": llm_zoo.LLAMA
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False},
    "Lfm2": llm_zoo.LLAMA | {"layer_types": ["conv", "full_attention"] * 2},
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_models(name):
    config = getattr(transformers, f"{name}Config")(**RECURRENT[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for use in (sublayer_map, SublayerPlan(mlp=[0]).apply, lambda m: watch(m, print)):
        with pytest.raises(SkipError, match=f"{name}ForCausalLM has recurrent layers"):
            use(model)


def test_what_is_no_language_model():
    with pytest.raises(SkipError, match=r"expected a causal language model.*got str"):
        sublayer_map("gpt2")
    with pytest.raises(UnknownBlockError, match="Lists in it: none"):
        SublayerPlan(mlp=[0]).apply(nn.Linear(2, 2))
    bert = transformers.BertConfig(**TINY, num_attention_heads=4, intermediate_size=48, is_decoder=True)
    with pytest.raises(UnknownBlockError, match=r"bert.encoder.layer \(2 x BertLayer\)"):
        sublayer_map(transformers.BertLMHeadModel(bert))


def test_an_encoder_decoder_cache():
    model = LLAMA.build()
    cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    with SublayerPlan(mlp=[0]).apply(model), pytest.raises(SkipError, match="EncoderDecoderCache"):
        model(llm_zoo.prompt(), **{CACHE: cache})


# -- models that nobody described ----------------------------------------------------------------------

UNKNOWN = {
    "Glm": llm_zoo.LLAMA | {"head_dim": 8},
    "Cohere2": llm_zoo.LLAMA | {"sliding_window": 4},
    "GPTNeo": llm_zoo.GPT
    | {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 64}
    | {"attention_types": [[["global", "local"], 2]]},
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_model_is_probed(name, monkeypatch):
    monkeypatch.setattr("skipguide.families.language.DECODER_LAYOUTS", ())  # whatever is described today
    paths = {"layers": "transformer.h", "attn": "attn.attention.out_proj", "mlp": ("mlp.c_proj",)}
    lm = llm_zoo.LM(name, name, UNKNOWN[name], **(paths if name == "GPTNeo" else {}))
    model = lm.build()
    with pytest.raises(UnknownBlockError):
        find_blocks(model)
    before, ids = traces(model), llm_zoo.prompt()
    found = sublayer_map(model)
    assert found.num_layers == 4 and found.parallel == (name == "Cohere2") and traces(model) == before
    plan = SublayerPlan(attn=[0, 2], mlp=[1, 2])
    zeroed = lm.zeroed(model, plan.attn, plan.mlp)
    with plan.apply(model):
        got = model.generate(ids, max_new_tokens=3, output_logits=True, return_dict_in_generate=True, do_sample=False)
    ref = zeroed.generate(ids, max_new_tokens=3, output_logits=True, return_dict_in_generate=True, do_sample=False)
    assert all(map(torch.equal, got.logits, ref.logits))
    assert len(measure_costs(model, 8, repeats=1).mlp_ms) == 4


@pytest.mark.parametrize(
    ("head", "path"),
    [("SequenceClassification", "model"), ("TokenClassification", "model"), ("QuestionAnswering", "transformer")],
)
def test_heads_that_are_not_causal_are_probed(head, path):
    lm = llm_zoo.LM(head, "Llama", layers=f"{path}.layers")
    build = getattr(transformers, f"LlamaFor{head}")
    model, ids = llm_zoo.randomise(build(transformers.LlamaConfig(**llm_zoo.LLAMA))), llm_zoo.prompt()
    zeroed = lm.zeroed(model, [1], [2])
    with SublayerPlan(attn=[1], mlp=[2]).apply(model):
        got = model(ids)[0]
    assert torch.equal(got, zeroed(ids)[0])


def test_a_model_that_sees_is_probed_at_its_language():
    """The vision tower has more layers of the same shape."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**llm_zoo.LLAMA),
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=32, patch_size=16, projection_dim=16),
        image_token_index=60,
    )
    model = llm_zoo.randomise(transformers.LlavaForConditionalGeneration(config))
    plan, lm = SublayerPlan(attn=[0, 2], mlp=[1, 2]), llm_zoo.LM("llava", "Llava", layers="model.language_model.layers")
    inputs = {"input_ids": torch.tensor([[3, 60, 60, 60, 60, 7, 9]]), "pixel_values": torch.ones(1, 3, 32, 32)}
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with plan.apply(model):
        got = model.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)
    zeroed = lm.zeroed(model, plan.attn, plan.mlp)
    expected = zeroed.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)
    assert sublayer_map(model).num_layers == 4 and all(map(torch.equal, got.logits, expected.logits))


def test_a_model_that_does_not_run_is_refused_with_the_reason():
    model = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**llm_zoo.LLAMA | {"pad_token_id": None})
    )
    before = traces(model)
    with pytest.raises(UnknownBlockError, match="no padding token"):
        SublayerPlan(mlp=[0]).apply(model)
    assert traces(model) == before


class Strange(nn.Module):
    """A layer of an unknown model that is not what it looks like."""

    def __init__(self, inner, how):
        super().__init__()
        self.self_attn, self.mlp = inner.self_attn, inner.mlp
        self.norm, self.post, self.how = inner.input_layernorm, inner.post_attention_layernorm, how

    def forward(self, hidden_states, **rest):
        h = hidden_states + self.self_attn(self.norm(hidden_states), **rest)[0]
        if self.how == "unused":
            return h
        h = h + self.mlp(self.post(h))
        return self.post(h) if self.how == "postnorm" else h


@pytest.mark.parametrize(
    ("how", "message"), [("postnorm", "is not the identity"), ("unused", "does not call self_attn and mlp")]
)
def test_an_unknown_model_that_cannot_be_proven_is_refused(how, message):
    model = LLAMA.build()
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = Strange(layer, how)
    model.__class__ = type("NobodyKnowsForCausalLM", (_Bare,), {})
    before = traces(model)
    with pytest.raises(UnknownBlockError, match=message):
        SublayerPlan(mlp=[0]).apply(model)
    assert traces(model) == before


class _Bare(nn.Module):
    """LlamaForCausalLM without its name."""

    def forward(self, *args, **kwargs):
        return transformers.LlamaForCausalLM.forward(self, *args, **kwargs)
