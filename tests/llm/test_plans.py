"""Sublayer plans on language models: scales, phases, extension, drafting, threads, traces, the ledger."""

import copy
import gc
import threading
import weakref
from contextvars import copy_context

import pytest
import torch
from helpers import llm_zoo
from helpers.llm_zoo import CACHE
from helpers.residue import agrees, no_gates, traces

from skipguide import LostGateError, NoEffectError, SkipError
from skipguide.active import active_plans
from skipguide.gate import Gate
from skipguide.llm import SublayerPlan, sublayer_map, watch

LLAMA = llm_zoo.BY_NAME["llama"]
IDS = llm_zoo.prompt()


def run(model, ids=IDS, **rest):
    return model(ids, use_cache=False, **rest).logits


class LeftOut(torch.nn.Module):
    """A sublayer that was taken out by hand, its factor in its place."""

    def __init__(self, layer, attn=None, mlp=None):
        super().__init__()
        self.layer, self.attn, self.mlp = layer, attn, mlp

    def forward(self, h, **rest):
        layer = self.layer
        if self.attn is None:
            h = h + layer.self_attn(layer.input_layernorm(h), **rest)[0]
        else:
            h = h * self.attn
        return h + layer.mlp(layer.post_attention_layernorm(h)) if self.mlp is None else h * self.mlp


def by_hand(model, attn, mlp):
    """A copy of a Llama-like model whose layers are written anew, without hooks."""
    edited = copy.deepcopy(model)
    for i, layer in enumerate(edited.model.layers):
        edited.model.layers[i] = LeftOut(layer, attn.get(i), mlp.get(i))
    return edited


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_a_left_out_sublayer_is_the_stream_times_its_factor(name):
    model = llm_zoo.BY_NAME[name].build()
    attn, mlp = {0: 1.25, 2: 0.5}, {1: 1.1, 2: 0.75, 3: 1.0}
    with SublayerPlan(attn=[0, 2], mlp=[1, 2, 3], attn_scale=attn, mlp_scale={1: 1.1, 2: 0.75}).apply(model):
        assert torch.equal(run(model), run(by_hand(model, attn, mlp)))


def test_scales_in_every_serial_layout():
    """The stream that the next sublayer sees is the one before, times the factor: watched from outside the plan."""
    for lm in llm_zoo.ALL:
        model = lm.build()
        if not sublayer_map(model).scalable:
            continue
        streams = {}
        plan = SublayerPlan(attn=[1], mlp=[2], attn_scale={1: 1.5}, mlp_scale={2: 0.5})
        with plan.apply(model), watch(model, lambda i, part, x, y, s=streams: s.update({(i, part): (x, y)})):
            run(model)
        for key, factor in (((1, "attn"), 1.5), ((2, "mlp"), 0.5)):
            before, after = streams[key]
            assert torch.equal(before * factor, after), (lm, key)


def test_extra_feed_forwards_belong_to_one_sequence():
    model, base = LLAMA.build(), SublayerPlan(attn=[1])
    more = SublayerPlan(attn=[1], mlp=[1, 3], mlp_scale={3: 1.5})
    token = IDS[:, :1]
    with base.apply(model) as applied:
        with pytest.raises(SkipError, match="after a pass"):
            applied.extend([3])
        one = model(IDS, use_cache=True)[CACHE]
        two, kept = copy.deepcopy(one), copy.deepcopy(one)
        plain = model(token, **{CACHE: copy.deepcopy(one)}).logits
        assert torch.equal(model(token, **{CACHE: one}).logits, plain)
        model(token, **{CACHE: kept})
        model(token, **{CACHE: one})
        model(token, **{CACHE: kept})
        applied.extend([1, 3], mlp_scale={3: 1.5})
        extended = model(token, **{CACHE: kept}).logits
        assert applied.extra == {1: None, 3: 1.5}
        unextended = model(token, **{CACHE: one}).logits
        assert applied.extra == {} and not torch.equal(extended, unextended)
        assert torch.equal(model(token, **{CACHE: two}).logits, plain)
        model(token, **{CACHE: kept})
        assert applied.extra == {1: None, 3: 1.5}
        model(IDS)
        assert applied.extra == {}
        with pytest.raises(SkipError, match="out of range"):
            applied.extend([9])
        with pytest.raises(SkipError, match="finite positive"):
            applied.extend([3], {3: float("nan")})
        assert applied.stats.skips["model.layers.3.mlp"] == 2
    no_gates(model)
    with base.apply(model):
        again = model(IDS, use_cache=True)[CACHE]
        for _ in range(2):
            model(token, **{CACHE: again})
    with more.apply(model):
        assert torch.equal(model(token, **{CACHE: _relabelled(again, more)}).logits, extended)


def _relabelled(cache, plan):
    cache._skipguide_mark.plan = plan
    return cache


@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon_new", "gpt2", "deepseekv3"])
def test_drafting_on_the_full_models_cache(name):
    """The draft is the skipped model's on that prompt; afterwards the cache is the full one, to the same objects."""
    lm = llm_zoo.BY_NAME[name]
    model, plan, token = lm.build(), SublayerPlan(attn=[0, 2], mlp=[1, 2]), IDS[:, -1:]
    cache = model(IDS, use_cache=True)[CACHE]
    cache.activate_past_recording()
    layers, keys = list(cache.layers), [layer.keys.clone() for layer in cache.layers]
    expected = model(token, **{CACHE: copy.deepcopy(cache)}).logits
    with SublayerPlan(plan.attn, plan.mlp, phase="decode").apply(model):
        other = copy.deepcopy(cache)
        draft = [model(token, **{CACHE: other}).logits for _ in range(2)]
    with plan.apply(model) as applied:
        applied.enabled = False
        for _ in range(2):
            with applied.drafting(cache):
                assert torch.equal(model(token, **{CACHE: cache}).logits, draft[0])
                assert torch.equal(model(token, **{CACHE: cache}).logits, draft[1])
            assert all(a is b for a, b in zip(cache.layers, layers, strict=True))
            assert all(torch.equal(layer.keys, before) for layer, before in zip(cache.layers, keys, strict=True))
        assert torch.equal(model(token, **{CACHE: cache}).logits, expected)
        assert applied.stats.skips[applied.map.name(0, "attn")] == 4
    assert not hasattr(cache, "_skipguide_mark")


def test_drafting_ends_well_after_an_error():
    model, plan = LLAMA.build(), SublayerPlan(attn=[0])
    cache = model(IDS, use_cache=True)[CACHE]
    layers = list(cache.layers)
    with plan.apply(model) as applied:
        with pytest.raises(KeyError), applied.drafting(cache):
            model(IDS[:, :1], **{CACHE: cache})
            raise KeyError
        assert cache.layers == layers and cache.get_seq_length() == IDS.shape[1]


# -- threads and traces ------------------------------------------------------------------------------------------


def in_thread(work):
    out = []
    thread = threading.Thread(target=lambda: out.append(work()))
    thread.start()
    thread.join(600)
    return out[0]


def test_threads_with_their_own_plans():
    model = LLAMA.build()
    plans = [SublayerPlan(attn=[0]), SublayerPlan(mlp=[1, 2], phase="decode"), SublayerPlan(attn=[2], mlp=[2]), None]
    settings = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    barrier, wrong = threading.Barrier(len(plans), timeout=600), []

    def generate():
        return torch.stack(model.generate(IDS, **settings).logits)

    def under(plan):
        if plan is None:
            return generate()
        with plan.apply(model):
            return generate()

    expected = [under(plan) for plan in plans]

    def work(plan, reference):
        for _ in range(5):
            barrier.wait()
            if not agrees(under(plan), reference):
                wrong.append(plan)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(plans, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert not wrong
    no_gates(model)


def test_tasks_in_threads_of_their_own_do_not_disturb_each_other():
    """`asyncio.to_thread` and the thread pools of servers run in copies of one context."""
    model, plan = LLAMA.build(), SublayerPlan(attn=[2], mlp=[3], phase="decode")
    whole, inside, go_on, found = model(IDS).logits, threading.Event(), threading.Event(), []

    def hold(*_):
        if threading.current_thread().name == "prompt":
            inside.set()
            assert go_on.wait(60)

    hook = model.model.layers[0].register_forward_pre_hook(hold)
    with plan.apply(model) as applied:
        cache = model(IDS, use_cache=True)[CACHE]
        contexts = [copy_context(), copy_context()]
        prompt = threading.Thread(target=lambda: found.append(contexts[0].run(model, IDS).logits), name="prompt")
        prompt.start()
        assert inside.wait(60)
        in_thread(lambda: contexts[1].run(model, IDS[:, :1], **{CACHE: cache}))  # decodes in the middle of the prompt
        go_on.set()
        prompt.join(600)
    hook.remove()
    assert agrees(found[0], whole) and applied.stats.passes == 3
    assert applied.stats.skips == {"model.layers.2.self_attn": 1, "model.layers.3.mlp": 1}
    no_gates(model)


def test_a_decode_plan_without_a_cache_is_noticed():
    model, plan = LLAMA.build(), SublayerPlan(attn=[0], mlp=[1], phase="decode")
    with pytest.raises(NoEffectError, match="all 4 passes ran without a cache"), plan.apply(model):
        model.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=False)
    with plan.apply(model) as applied:  # a prompt alone is whole, as it should be
        run(model)
        model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert applied.stats.skips


@pytest.mark.parametrize("mlp", [[2], [0, 2]], ids=["attention alone", "whole layers"])
def test_attention_maps_keep_the_numbers_of_their_layers(mlp):
    model = LLAMA.build()
    model.set_attn_implementation("eager")
    zeroed = LLAMA.zeroed(model, [0, 2], mlp)
    with SublayerPlan(attn=[0, 2], mlp=mlp).apply(model):
        got = model(IDS, output_attentions=True, output_hidden_states=True)
    whole = zeroed(IDS, output_attentions=True, output_hidden_states=True)
    assert [found is None for found in got.attentions] == [True, False, True, False]
    assert all(torch.equal(got.attentions[i], whole.attentions[i]) for i in (1, 3))
    assert all(map(torch.equal, got.hidden_states, whole.hidden_states))


def test_a_plan_that_only_other_threads_missed_is_noticed():
    model, plan = LLAMA.build(), SublayerPlan(attn=[0], mlp=[1])
    plain = run(model)
    with plan.apply(model):
        skipped = run(model)
    with pytest.raises(NoEffectError, match="everywhere=True"), plan.apply(model):
        assert torch.equal(in_thread(lambda: run(model)), plain)
    with plan.apply(model, everywhere=True):
        assert torch.equal(in_thread(lambda: run(model)), skipped) and torch.equal(run(model), skipped)
    with plan.apply(model) as applied:

        def work():
            with applied.running():
                return run(model)

        assert torch.equal(in_thread(work), skipped)
    no_gates(model)
    with pytest.raises(SkipError, match="removed"), applied.running():
        pass


def test_no_trace_after_every_way_of_ending():
    model, plan = LLAMA.build(), SublayerPlan(attn=[0, 1], mlp=[1, 2], attn_scale={0: 2.0})
    before, plain = traces(model), run(model)

    def same():
        assert traces(model) == before and torch.equal(run(model), plain) and active_plans() == ()
        no_gates(model)

    for _ in range(2):
        with plan.apply(model):
            assert not torch.equal(run(model), plain)
        same()
    with pytest.raises(KeyError), plan.apply(model):
        raise KeyError
    same()
    applied = plan.apply(model)
    model.generate(IDS, max_new_tokens=2)
    applied.extend([0])
    applied.remove()
    applied.remove()
    for name in ("_previous_max_cache_length", "_compiled_call", "_last_compile_config"):
        model.__dict__.pop(name, None)  # of transformers' generate
    same()
    hook = model.model.layers[3].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), plan.apply(model):
        run(model)
    hook.remove()
    same()
    with pytest.raises(SkipError), plan.apply(model), SublayerPlan(mlp=[0]).apply(model):
        pass
    same()


def test_a_failed_installation_takes_everything_away(monkeypatch):
    model = LLAMA.build()
    before, install, count = traces(model), Gate.install, iter(range(100))

    def fails(gate, *args, **kwargs):
        if next(count) == 3:
            raise MemoryError
        install(gate, *args, **kwargs)

    monkeypatch.setattr(Gate, "install", fails)
    with pytest.raises(MemoryError):
        SublayerPlan(attn=[0, 1], mlp=[2]).apply(model)
    monkeypatch.undo()
    assert traces(model) == before and active_plans() == ()


def test_a_handle_that_nobody_keeps_does_not_end_the_plan_and_the_model_can_go():
    model = LLAMA.build()
    plain = run(model)
    SublayerPlan(attn=[0]).apply(model)
    gc.collect()
    assert not torch.equal(run(model), plain)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("what", ["sublayer", "decoder", "exchanged"])
def test_a_lost_gate_is_noticed(what):
    model = LLAMA.build()
    with pytest.raises(LostGateError), SublayerPlan(attn=[0], mlp=[2]).apply(model):
        if what == "exchanged":
            model.model.layers[2].mlp = copy.deepcopy(LLAMA.build().model.layers[2].mlp)
        else:
            module = model.model if what == "decoder" else model.model.layers[0].self_attn
            module.forward = type(module).forward.__get__(module)
        run(model)


def test_a_copy_is_free_of_the_plan():
    model = LLAMA.build()
    plain = run(model)
    with SublayerPlan(attn=[0], mlp=[2]).apply(model):
        twin = copy.deepcopy(model)
        no_gates(twin)
        assert torch.equal(run(twin), plain)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_through_peft():
    peft = pytest.importorskip("peft")
    model = LLAMA.build()
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2)).eval()
    plain = run(tuned)
    with SublayerPlan(attn=[0], mlp=[2]).apply(tuned) as applied:
        out = run(tuned)
        tuned.generate(input_ids=IDS, max_new_tokens=3)
    assert applied.stats.passes == 4 and not torch.equal(out, plain) and torch.equal(run(tuned), plain)


def test_the_ledger():
    model = LLAMA.build()
    seen = []
    with SublayerPlan(attn=[0], mlp=[2, 3], phase="decode").apply(model) as applied:
        applied.listeners.append(lambda now: seen.append((now.tokens, now.decode, now.fresh)))
        ids, mask = llm_zoo.left_padded()
        model.generate(ids, attention_mask=mask, max_new_tokens=3)
        assert seen == [(7, False, True), (1, True, False), (1, True, False)]
        stats = applied.stats
        assert stats.passes == 3 and stats.calls["model.layers.0.self_attn"] == 1
        assert stats.skips == dict.fromkeys(("model.layers.0.self_attn", "model.layers.2.mlp", "model.layers.3.mlp"), 2)
        assert stats.skipped_fraction == pytest.approx(2 * 3 / (3 * 8))
        one = 2 * 2 * 2 * 8 * 4 * 9  # keys and values, rows, heads, their width, bytes, tokens
        assert (stats.kv_bytes, stats.kv_bytes_saved) == (3 * one, one)
        applied.enabled = False
        run(model)
        assert stats.passes == 3
    assert stats.to_dict()["passes"] == 3 and "25.0% of the sublayers left out" in repr(stats)


def test_gradients_flow_through_what_stays():
    """The prompt pass of a fine-tuning step: the same gradients as with zeroed projections."""
    model = LLAMA.build().requires_grad_(True)
    zeroed = LLAMA.zeroed(model, [0, 2], [1, 2]).requires_grad_(True)
    with SublayerPlan(attn=[0, 2], mlp=[1, 2]).apply(model):
        run(model).square().mean().backward()
    run(zeroed).square().mean().backward()
    for (name, one), other in zip(model.named_parameters(), zeroed.parameters(), strict=True):
        if one.grad is not None and one.grad.any():
            assert torch.equal(one.grad, other.grad), name
