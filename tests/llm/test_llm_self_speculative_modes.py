"""Ways of decoding that self-speculation does not know are refused, where it would decode greedily and say nothing."""

import pytest
import torch
from helpers import drafting
from helpers.drafting import DRAFTS, prompt, state
from helpers.llm_zoo import BY_NAME

from skipguide.errors import SkipError
from skipguide.llm import SelfSpeculative

models, llama = drafting.models, drafting.llama


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
