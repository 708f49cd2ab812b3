"""Self-speculative decoding: the full model's text, whatever is drafted."""

import pytest
import torch
from helpers import drafting
from helpers.drafting import DRAFTS, FAMILIES, FIXED, SETS, prompt, state
from helpers.llm_zoo import CACHE
from transformers import GenerationConfig, LlamaForCausalLM

from skipguide.llm import SelfSpeculative

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
