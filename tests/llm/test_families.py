"""Every family of language models, bit-equal to a copy whose output projections are zero, in every way to run it."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from helpers import llm_zoo
from helpers.llm_zoo import CACHE
from torch import nn

from skipguide import SkipError, Skipper, SkipPlan, check, find_blocks
from skipguide.families.language import DECODER_LAYOUTS
from skipguide.llm import SublayerPlan, sublayer_map, watch
from skipguide.llm.sublayers import families_table

families = pytest.mark.parametrize("lm", llm_zoo.ALL, ids=repr)
WAYS = {
    "cached": {},
    "static": {"cache_implementation": "static"},
    "beam": {"num_beams": 2},
    "chunked": {"prefill_chunk_size": 3},
}
# transformers itself: "Cannot use prefill chunking without a cache"
CANNOT = {("mpt", "chunked")}


def plan_for(lm):
    """Attention of layer 0, a feed-forward, and one layer whole."""
    whole = 4 if lm.shares else 2  # layers 2 and 3 give others their keys
    return SublayerPlan(attn=[0, whole], mlp=[1, whole])


def generate(model, **way):
    ids, mask = llm_zoo.left_padded()
    settings = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(ids, attention_mask=mask, **settings, **way)


def same(one, other):
    return torch.equal(one.sequences, other.sequences) and all(map(torch.equal, one.logits, other.logits))


def forward(model, **rest):
    ids, mask = llm_zoo.left_padded()
    return model(ids, attention_mask=mask, **rest).logits


@families
def test_equal_to_zeroed_output_projections(lm):
    model, plan = lm.build(), plan_for(lm)
    zeroed, before = lm.zeroed(model, plan.attn, plan.mlp), forward(model)
    ways = {name: way for name, way in WAYS.items() if (lm.name, name) not in CANNOT}
    expected = {name: generate(zeroed, **way) for name, way in ways.items()}
    with plan.apply(model) as applied:
        assert torch.equal(forward(model), forward(zeroed))
        for name, way in ways.items():
            assert same(generate(model, **way), expected[name]), name
        assert torch.equal(forward(model, use_cache=False), forward(zeroed))
        stats = applied.stats
    assert not torch.equal(forward(zeroed), before) and torch.equal(forward(model), before)
    left_out = {applied.map.name(i, "attn") for i in plan.attn} | {applied.map.name(i, "mlp") for i in plan.mlp}
    assert set(stats.skips) == left_out and not any(stats.calls[name] for name in left_out)
    assert stats.skipped_fraction == pytest.approx(4 / len(applied.map.sites))


@families
def test_phases(lm):
    """Decode: the first pass is the whole model's, the steps after it are not; prefill: the other way round."""
    model, plan = lm.build(), plan_for(lm)
    zeroed, ids = lm.zeroed(model, plan.attn, plan.mlp), llm_zoo.prompt()
    with SublayerPlan(plan.attn, plan.mlp, phase="decode").apply(model) as applied:
        out = model(ids, use_cache=True)
        assert torch.equal(out.logits, (full := lm_run(lm, ids)).logits)
        step = model(ids[:, :1], **{CACHE: out[CACHE]}).logits
        assert torch.equal(step, zeroed(ids[:, :1], **{CACHE: full[CACHE]}).logits)
        assert applied.stats.kv_bytes_saved > 0
    with SublayerPlan(plan.attn, plan.mlp, phase="prefill").apply(model):
        out, full = model(ids, use_cache=True), zeroed(ids, use_cache=True)
        assert torch.equal(out.logits, full.logits)
        step = model(ids[:, :1], **{CACHE: out[CACHE]}).logits
        no_attention = lm.zeroed(model, plan.attn)
        assert torch.equal(step, no_attention(ids[:, :1], **{CACHE: full[CACHE]}).logits)


def lm_run(lm, ids):
    return lm.build()(ids, use_cache=True)


@families
def test_the_core_leaves_out_blocks_and_sublayers(lm):
    model = lm.build()
    blocks = find_blocks(model)
    assert len(blocks) == sublayer_map(model).num_layers and blocks[0].parts[:3] == ("block", "attn", "mlp")
    for part in ("attn", "mlp"):
        with Skipper(model, SkipPlan([1], part=part)) as skipper:
            out = forward(model, use_cache=False)
        assert torch.equal(out, forward(lm.zeroed(model, **{part: [1]}))), part
        assert 0 < skipper.stats.skipped_fraction < 1 / len(blocks)
    taken_out = copy.deepcopy(model)
    taken_out.get_submodule(lm.layers)[1] = PassesOn(tuple_out=blocks[1].spec.none_outputs)
    with Skipper(model, SkipPlan([1])):
        assert torch.equal(forward(model, use_cache=False), forward(taken_out, use_cache=False))


class PassesOn(nn.Module):
    def __init__(self, tuple_out):
        super().__init__()
        self.tuple_out = tuple_out
        self.attention_type = "full_attention"

    def forward(self, hidden_states, *args, **kwargs):
        return (hidden_states, None) if self.tuple_out else hidden_states


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon_new", "gemma2"])
def test_the_self_test_of_the_core_runs_on_language_models(name):
    model = llm_zoo.BY_NAME[name].build()
    assert check(model).blocks == 4


@families
def test_the_watched_stream_is_the_residual_stream(lm):
    """a is x with the sublayer added: it is x where the sublayer is zero, and m is the next layer's x."""
    model = lm.build()
    if lm.shares:
        with pytest.raises(ValueError, match="residual stream"), watch(model, print):
            pass
        return
    zeroed, streams = lm.zeroed(model, attn=[1], mlp=[2]), {}
    with watch(zeroed, lambda layer, part, before, after: streams.update({(layer, part): (before, after)})):
        out = forward(zeroed)
    assert list(streams) == [(i, part) for i in range(4) for part in ("attn", "mlp")]
    states = zeroed(*llm_zoo.left_padded()[:1], attention_mask=llm_zoo.left_padded()[1], output_hidden_states=True)
    assert torch.equal(states.logits, out)
    for i in range(4):
        x, a = streams[i, "attn"]
        a_again, m = streams[i, "mlp"]
        assert torch.equal(x, states.hidden_states[i]) and a_again is a
        if i < 3:
            assert torch.equal(m, states.hidden_states[i + 1])
    if "postnorm" not in lm.name:
        assert torch.equal(*streams[1, "attn"]) and not torch.equal(*streams[0, "attn"])
        assert torch.equal(*streams[2, "mlp"]) and not torch.equal(*streams[1, "mlp"])


def test_every_described_class_is_proven():
    """The data and the families tested here agree: nothing is claimed that no test covers."""
    tested = {type(lm.build()).__name__ for lm in llm_zoo.ALL}
    described = {
        name for layout in DECODER_LAYOUTS for name in layout.models if name.endswith(("ForCausalLM", "LMHeadModel"))
    }
    assert {name for name in described if hasattr(transformers, name)} == tested
    reached = {id(sublayer_map(lm.build()).layout) for lm in llm_zoo.ALL}
    assert reached == {id(layout) for layout in DECODER_LAYOUTS}
    table = families_table()
    assert all(name.removesuffix("ForCausalLM").removesuffix("LMHeadModel") in table for name in described)
    assert table in (Path(__file__).parents[2] / "skipguide" / "llm" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon_new", "gpt2"])
@pytest.mark.parametrize("part", ["attn", "block"])
def test_the_core_minds_the_kv_cache(name, part):
    lm = llm_zoo.BY_NAME[name]
    model = lm.build()
    zeroed = lm.zeroed(model, attn=[0], mlp=[0] if part == "block" else [])
    with Skipper(model, SkipPlan([0], part=part)):
        for way in WAYS.values():
            assert same(generate(model, **way), generate(zeroed, **way))
        cache = model(llm_zoo.prompt(), use_cache=True)[CACHE]
    with pytest.raises(SkipError, match="filled while the attention of this layer was left out"):
        model(llm_zoo.prompt()[:, :1], **{CACHE: cache})
    with Skipper(model, SkipPlan([0], part=part, rows=[0])), pytest.raises(SkipError, match="use_cache=False"):
        model(llm_zoo.prompt(), use_cache=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mixtral", "falcon_new"])
def test_on_a_gpu(name):
    lm = llm_zoo.BY_NAME[name]
    model, plan = lm.build(), plan_for(lm)
    zeroed = lm.zeroed(model, plan.attn, plan.mlp).cuda()
    model.cuda()
    ids = llm_zoo.prompt().cuda()
    for way in WAYS.values():
        settings = {"max_new_tokens": 4, "do_sample": False, "disable_compile": True} | way
        expected = zeroed.generate(ids, **settings)
        with plan.apply(model):
            assert torch.equal(model.generate(ids, **settings), expected)
