"""Tiny models of three families, sublayers for their drafts to leave out, prompts, and what a draft could leave."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from skipguide.llm import SelfSpeculative, SublayerPlan

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
