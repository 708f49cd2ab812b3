"""The published AdaSkip's outputs, the model that they are of, and greedy text of it."""

import json
from pathlib import Path

import pytest
import torch
from helpers.llm_zoo import CACHE
from safetensors.torch import load_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from skipguide.llm import AdaSkip

GOLDEN = Path(__file__).parents[1] / "golden" / "llm"


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "adaskip_golden.json").read_text())


@pytest.fixture(scope="module")
def model(golden):
    config = {k: v for k, v in golden["config"].items() if k != "rope_theta"}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": golden["config"]["rope_theta"]}
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    model.load_state_dict(load_file(GOLDEN / "adaskip_weights.safetensors"))
    return model


@pytest.fixture(scope="module")
def stats(golden, model):
    return AdaSkip.calibrate(model, golden["warmup_ids"])


def generate(model, prompt, tokens=32, cache=None, **settings):
    """Greedy tokens, the logits of every step, and the cache."""
    ids = torch.as_tensor(prompt)
    ids = ids[None] if ids.dim() == 1 else ids
    cache = DynamicCache() if cache is None else cache
    with torch.no_grad():
        out = model.generate(
            ids, max_new_tokens=tokens, do_sample=False, **{CACHE: cache}, output_logits=True, eos_token_id=None,
            return_dict_in_generate=True, **{"attention_mask": torch.ones_like(ids)} | settings,
        )  # fmt: skip
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1), cache


def padded(prompts):
    """Prompts in one batch, padded on the left, and its mask."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def lengths(cache, layers):
    """Tokens of keys per layer, None where there are none."""
    keys = [getattr(layer, "keys", None) for layer in cache.layers]
    return [None if k is None else k.shape[-2] for k in keys] + [None] * (layers - len(keys))


def settings_of(case):
    variant, _, online = case["variant"].partition("+")
    phase = {"prefill": "prefill", "decode": "decode", "e2e": "both"}[variant]
    return AdaSkip(count=case["N"], phase=phase, online=True, reference_compat=not online)
