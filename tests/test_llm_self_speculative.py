"""Self-speculative decoding: the full model's output, whatever is drafted; no trace; clear refusals."""

import math

import pytest
import torch
from llm_zoo import CACHE
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    Qwen3Config,
    Qwen3ForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

from skipguide import SkipError
from skipguide.llm import AdaSkip, SelfSpeculative, SublayerPlan, SublayerStats
from skipguide.llm.acceptance import Calibration, Controller, best_length, speedup, tokens_per_round
from skipguide.llm.cost import SublayerCosts
from skipguide.llm.drafter import choose_drafter
from skipguide.llm.verify import accept_greedy, accept_sampled

VOCABULARY, LAYERS = 61, 5
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    # windows of 8: every prompt and draft crosses them
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=8)),
}
SETS = {
    "first": SublayerPlan(attn=(0,), mlp=(0,)),
    "scattered": SublayerPlan(attn=(1, 4), mlp=(2, 3)),
    "most": SublayerPlan(attn=(0, 1, 2, 3), mlp=(1, 2, 3, 4)),
}
FIXED = {"adaptive": False, "max_draft": 4}
DRAFTS = SelfSpeculative(plan=SETS["scattered"], **FIXED)


@pytest.fixture(scope="module")
def models():
    found = {}
    for name, build in FAMILIES.items():
        torch.manual_seed(0)
        found[name] = build().eval()
    return found


@pytest.fixture
def llama(models):
    return models["llama"]


def prompt(seed, length=None, rows=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (rows, length or 3 + 2 * seed), generator=generator)


def state(model):
    """What could be left behind: replaced methods and hooks."""
    return {
        name: (
            {"forward", "generate"} & set(module.__dict__),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    }


# --- lossless


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("skipped", SETS)
def test_greedy_output_is_the_full_models(models, family, skipped):
    model, spec = models[family], SelfSpeculative(plan=SETS[skipped], **FIXED)
    before = state(model)
    for seed in range(10):
        ids = prompt(seed)
        plain = model.generate(ids, max_new_tokens=12, do_sample=False)
        with spec.apply(model) as applied:
            drafted = model.generate(ids, max_new_tokens=12, do_sample=False)
        assert torch.equal(plain, drafted), seed
        assert applied.stats.rounds and applied.stats.drafted >= applied.stats.accepted
    assert state(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_a_drafter_chosen_from_the_prompts_own_prefill(models, family):
    model = models[family]
    prefills = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda m, args: prefills.append(args[0].shape[1]))
    with SelfSpeculative(max_draft=3).apply(model) as applied:
        drafted = model.generate(prompt(4), max_new_tokens=24, do_sample=False)
    handle.remove()
    assert torch.equal(drafted, model.generate(prompt(4), max_new_tokens=24, do_sample=False))
    assert prefills[0] == prompt(4).shape[1] and max(prefills[1:]) <= 4, (
        "one prefill, then drafts and their verification"
    )
    assert applied.stats.attn or applied.stats.mlp
    assert applied.costs.phase == "decode" and min(*applied.costs.attn_ms, *applied.costs.mlp_ms) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_batches(models, family):
    model, ids = models[family], prompt(5, 11, rows=3)
    mask = torch.ones_like(ids)
    mask[0, :6] = mask[1, :2] = 0
    call = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    assert torch.equal(DRAFTS.generate(model, ids, **call), model.generate(ids, **call))
    whole = model.generate(ids, **call)
    ends = [int(whole[0, 14]), int(whole[1, 19])]  # rows end at different times
    plain = model.generate(ids, **call, eos_token_id=ends)
    assert (plain == 0).any()
    assert torch.equal(DRAFTS.generate(model, ids, **call, eos_token_id=ends), plain)


def test_through_the_public_custom_generate(llama):
    plain = llama.generate(prompt(1), max_new_tokens=12, do_sample=False)
    assert torch.equal(llama.generate(prompt(1), max_new_tokens=12, do_sample=False, custom_generate=DRAFTS), plain)
    assert torch.equal(DRAFTS.generate(llama, prompt(1), max_new_tokens=12, do_sample=False), plain)
    config = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(DRAFTS.generate(llama, prompt(1), generation_config=config), plain)


def test_adaptive_drafting_changes_nothing_but_speed(llama):
    spec = SelfSpeculative(plan=SETS["most"], max_draft=6)
    for seed in range(3):
        plain = llama.generate(prompt(seed), max_new_tokens=40, do_sample=False)
        assert torch.equal(spec.generate(llama, prompt(seed), max_new_tokens=40, do_sample=False), plain)


def test_a_conversation_goes_on_with_the_returned_cache(llama):
    call = {"do_sample": False, "return_dict_in_generate": True, "max_new_tokens": 9}
    plain, drafted = llama.generate(prompt(2), **call), DRAFTS.generate(llama, prompt(2), **call)
    for a, b in zip(plain[CACHE].layers, drafted[CACHE].layers, strict=True):
        assert a.keys.shape == b.keys.shape
        assert torch.allclose(a.keys, b.keys, atol=1e-5)
    longer = torch.cat([plain.sequences, prompt(3)], dim=1)
    again = DRAFTS.generate(llama, longer, **{CACHE: drafted[CACHE]}, **call).sequences
    assert torch.equal(again, llama.generate(longer, **{CACHE: plain[CACHE]}, **call).sequences)


def test_half_precision_differs_only_where_logits_are_tied(llama):
    model = LlamaForCausalLM(llama.config).eval()
    model.load_state_dict(llama.state_dict())
    model = model.to(torch.bfloat16)
    for seed in range(5):
        plain = model.generate(prompt(seed), max_new_tokens=12, do_sample=False)
        drafted = DRAFTS.generate(model, prompt(seed), max_new_tokens=12, do_sample=False)
        differs = (plain != drafted)[0].nonzero()
        if len(differs):  # the first difference must be a tie, at this precision
            at = int(differs[0])
            logits = model(plain[:, :at]).logits[0, -1].float()
            gap = logits[plain[0, at]] - logits[drafted[0, at]]
            assert abs(gap) <= 2 * torch.finfo(torch.bfloat16).eps * logits.abs().max()


# --- what else generate promises


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


# --- sampling


def test_rejection_sampling_draws_from_the_full_model():
    """Exact in distribution: chi-square of the first two tokens of 40,000 seeded rounds, far drafter and near."""
    generator, count = torch.Generator().manual_seed(0), 40_000
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]])
    for q in (torch.tensor([[0.05, 0.15, 0.3, 0.5]]), torch.tensor([[0.45, 0.35, 0.1, 0.1]]), p[:1]):
        q = torch.cat([q, q.flip(1)])
        drafted = torch.stack(
            [torch.multinomial(row, count, replacement=True, generator=generator) for row in q], dim=1
        )
        verdict = accept_sampled(drafted, q.expand(count, 2, 4), p.expand(count, 3, 4), generator)
        first = verdict.tokens[:, 0].bincount(minlength=4)
        second = verdict.tokens[verdict.matches >= 1, 1].bincount(minlength=4)
        for found, expected in ((first, p[0]), (second, p[1])):
            expected = expected * found.sum()
            assert float(((found - expected) ** 2 / expected).sum()) < 16.3  # 99.9 % of chi-square, 3 degrees
        assert float((verdict.matches >= 1).float().mean()) == pytest.approx(
            float(torch.minimum(p[0], q[0]).sum()), abs=0.02
        )


def test_sampled_text_has_the_full_models_distribution(llama):
    """Third new token of 3,000 seeded continuations, drafted against plain, by a two-sample chi-square."""
    torch.manual_seed(1)
    rows = prompt(1).expand(3000, -1)
    call = {"max_new_tokens": 3, "do_sample": True, "top_k": 6, "temperature": 0.8}
    spec = SelfSpeculative(plan=SETS["most"], adaptive=False, max_draft=2)
    plain = llama.generate(rows, **call)[:, -1].bincount(minlength=VOCABULARY)
    drafted = spec.generate(llama, rows, **call)[:, -1].bincount(minlength=VOCABULARY)
    seen = plain + drafted > 20
    statistic = float(((plain - drafted)[seen] ** 2 / (plain + drafted)[seen]).sum())
    degrees = int(seen.sum()) - 1
    assert degrees >= 3
    assert statistic < degrees + 4 * math.sqrt(2 * degrees)


def test_sampling_can_be_repeated(llama):
    def run():
        torch.manual_seed(3)
        return DRAFTS.generate(llama, prompt(1, rows=2), max_new_tokens=12, do_sample=True)

    assert torch.equal(run(), run())


def test_greedy_verdicts():
    scores = torch.eye(5)[torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0]])]
    verdict = accept_greedy(torch.tensor([[1, 2, 3], [1, 0, 0]]), scores)
    assert verdict.matches.tolist() == [3, 0]
    assert verdict.tokens.tolist() == [[1, 2, 3, 4], [0, 0, 0, 0]]


# --- drafter and controller


def test_the_drafter_goes_by_similarity_per_millisecond():
    stats = SublayerStats((0.90, 0.95, 0.99), (0.80, 0.97, 0.98), (1.0,) * 3, (1.0,) * 3)
    cheap = choose_drafter(stats, SublayerCosts((3.0,) * 3, (1.0,) * 3, 0.0, 64), share=0.25)
    assert (cheap.attn, cheap.mlp) == ((2,), ()), "attention is dear here"
    dear = choose_drafter(stats, SublayerCosts((1.0,) * 3, (3.0,) * 3, 0.0, 64), share=0.25)
    assert (dear.attn, dear.mlp) == ((), (2,)), "the MLP is dear here"
    kept = choose_drafter(stats, SublayerCosts((3.0,) * 3, (1.0,) * 3, 0.0, 64), share=0.25, keep_attn=[2])
    assert 2 not in kept.attn
    nearly_all = choose_drafter(
        SublayerStats((0.99, 0.98, 0.99), (0.1,) * 3, (1.0,) * 3, (1.0,) * 3),
        SublayerCosts((1.0,) * 3, (1.0,) * 3, 0.0, 64),
        share=0.5,
    )
    assert nearly_all.attn == (0, 2), "one attention stays, the one that does most"


def test_the_analytic_speedup_of_the_specification():
    for acceptance, cost, expected in ((0.9, 0.5, 1.35), (0.9, 0.6, 1.21), (0.95, 0.4, 1.75), (0.95, 0.5, 1.49)):
        assert best_length(acceptance, cost)[1] == pytest.approx(expected, abs=0.006)
    assert best_length(0.7, 0.6)[1] < 1.04
    assert speedup(1.0, 4, 0.5, 1.0) == pytest.approx(5 / 3)
    assert tokens_per_round(0.0, 5) == 1


def rounds(controller, count, confidence, accepted, draft, verify):
    for _ in range(count):
        controller.round([confidence] * 4, accepted, 4 * draft, verify)


def test_drafting_goes_on_where_it_pays_and_stops_where_it_does_not():
    good = Controller()
    assert good.next_length() == 0, "a plain step first: what does one cost?"
    for _ in range(2):
        good.plain_step(1.0)
    rounds(good, 20, 0.9, 4, 0.3, 1.1)
    assert not good.off and good.next_length() > 0
    bad = Controller(retry=5)
    for _ in range(2):
        bad.plain_step(1.0)
    rounds(bad, 6, 0.9, 0, 0.6, 1.1)
    assert bad.off and bad.switched_off == 1 and bad.next_length() == 0
    for _ in range(5):
        bad.plain_step(1.0)
    assert bad.next_length() > 0, "the text may have become easier"
    rounds(bad, 6, 0.9, 0, 0.6, 1.1)
    assert bad.switched_off == 2


def test_the_next_request_begins_with_what_the_last_one_learned():
    bad = Controller(retry=5)
    for _ in range(2):
        bad.plain_step(1.0)
    rounds(bad, 6, 0.9, 0, 0.6, 1.1)
    following = bad.again()
    assert following.next_length() == 0 and following.switched_off == 0
    for _ in range(5):
        following.plain_step(1.0)
    assert following.next_length() > 0, "each request tries for itself"
    good = Controller()
    for _ in range(2):
        good.plain_step(1.0)
    rounds(good, 6, 0.9, 4, 0.3, 1.1)
    assert good.again().next_length() > 0, "no plain steps are needed first"
    assert good.again().draft_cost == good.draft_cost


def test_the_exit_goes_by_what_a_confidence_was_worth():
    controller = Controller()
    controller.plain_step(1.0)
    controller.plain_step(1.0)
    for _ in range(30):
        controller.round([0.99], 1, 0.3, 1.0)
        controller.round([0.3], 0, 0.3, 1.0)
    assert controller.worth_going_on([0.99]) != controller.worth_going_on([0.3])
    assert not controller.worth_going_on([0.3])
    unsure = Calibration()
    for _ in range(50):
        unsure.enter(0.1, True)
    assert unsure.chance(0.1) > 0.95, "an unsure drafter that is always right is trusted"


# --- bad input, and no trace


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


def test_sublayers_left_out_of_another_model_do_not_matter(models):
    settings = {"max_new_tokens": 8, "do_sample": False}
    plain = models["llama"].generate(prompt(2), **settings)
    with SETS["first"].apply(models["qwen3"]):
        assert torch.equal(DRAFTS.generate(models["llama"], prompt(2), **settings), plain)


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
    for wrong in (
        {"stats": SublayerStats((0.9,), (0.9,), (1.0,), (1.0,))},
        {"costs": SublayerCosts((1.0,), (1.0,), 0.0, 8)},
        {"plan": SublayerPlan(attn=(99,))},
        {"plan": SublayerPlan(attn=range(LAYERS))},
    ):
        with pytest.raises(SkipError):
            SelfSpeculative(**wrong).apply(llama)
    with pytest.raises(SkipError, match="generate"):
        SelfSpeculative().apply(torch.nn.Linear(2, 2))


def test_nan_in_the_model_is_named(llama):
    model = LlamaForCausalLM(llama.config).eval()
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(SkipError, match="NaN or inf"):
        SelfSpeculative().generate(model, prompt(1), max_new_tokens=8, do_sample=False)


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu(llama):
    model = LlamaForCausalLM(llama.config).eval().cuda()
    ids = prompt(4).cuda()
    plain = model.generate(ids, max_new_tokens=24, do_sample=False)
    for spec in (DRAFTS, SelfSpeculative()):
        assert torch.equal(spec.generate(model, ids, max_new_tokens=24, do_sample=False), plain)
