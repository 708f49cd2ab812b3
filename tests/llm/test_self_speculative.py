"""Self-speculative decoding: the full model's text and distribution, and all that generate promises."""

import math

import pytest
import torch
from helpers import drafting
from helpers.drafting import DRAFTS, FAMILIES, FIXED, SETS, VOCABULARY, prompt, state
from helpers.llm_zoo import CACHE
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

from skipguide.llm import SelfSpeculative
from skipguide.llm.speculative.verify import accept_greedy, accept_sampled

# Self-speculative decoding: the full model's text, whatever is drafted.

models, llama = drafting.models, drafting.llama


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


@torch.no_grad()
def test_half_precision_differs_only_where_logits_are_tied(llama):
    """Lossless in float32; in bfloat16 equal up to ties, as transformers' own verification of several tokens is.

    A pass over several tokens sums in another order. So the first token that differs must be one whose logit is the
    best one's up to what bfloat16 rounds; after it the texts go their own ways.
    """
    model = LlamaForCausalLM(llama.config).eval()
    model.load_state_dict(llama.state_dict())
    model = model.to(torch.bfloat16)
    call = {"max_new_tokens": 40, "do_sample": False}
    for seed in range(6):
        plain = model.generate(prompt(seed), **call)
        for other in (
            DRAFTS.generate(model, prompt(seed), **call),
            model.generate(prompt(seed), prompt_lookup_num_tokens=4, **call),
        ):
            differs = (plain != other)[0].nonzero()
            if len(differs):
                at = int(differs[0])
                logits = model(plain[:, :at]).logits[0, -1].float()
                gap = logits[plain[0, at]] - logits[other[0, at]]
                assert abs(gap) <= 4 * torch.finfo(torch.bfloat16).eps * logits.abs().max(), (seed, at)


def test_sublayers_left_out_of_another_model_do_not_matter(models):
    settings = {"max_new_tokens": 8, "do_sample": False}
    plain = models["llama"].generate(prompt(2), **settings)
    with SETS["first"].apply(models["qwen3"]):
        assert torch.equal(DRAFTS.generate(models["llama"], prompt(2), **settings), plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu(llama):
    model = LlamaForCausalLM(llama.config).eval().cuda()
    ids = prompt(4).cuda()
    plain = model.generate(ids, max_new_tokens=24, do_sample=False)
    for spec in (DRAFTS, SelfSpeculative()):
        assert torch.equal(spec.generate(model, ids, max_new_tokens=24, do_sample=False), plain)


# Self-speculative decoding keeps what generate promises: processors, criteria, streamers, scores.


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


# Self-speculative sampling has the full model's distribution; verdicts on paper.


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
