"""The small language model that ships: stock classes load it, it is small, and it has learned Python."""

import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from skipguide.assets import bundled
from skipguide.llm import AdaSkip


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(bundled("tiny-lm"))


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(bundled("tiny-lm"), dtype=torch.float32).eval()


def test_it_is_small_and_deep(model):
    assert sum(file.stat().st_size for file in bundled("tiny-lm").iterdir()) <= 8e6
    assert model.config.num_hidden_layers >= 12 and model.config.max_position_embeddings >= 1024


@settings(max_examples=30, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_comes_back_from_its_tokens(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_it_prefers_python(tokenizer, model):
    def loss(text):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            return model(ids, labels=ids).loss.item()

    code = textwrap.dedent(
        """
        def close(self):
            \"\"\"Close the file.\"\"\"
            if self.file is not None:
                self.file.close()
                self.file = None
        """
    )
    assert loss(code) < 3.0 < loss(code.replace("self", "bread").replace("if", "jam")) + 0.5
    assert loss(code) < loss(code[::-1]) - 1


def test_its_redundancy_is_of_a_trained_model(tokenizer, model):
    """Left out by AdaSkip, a sixth of the sublayers costs less than the same number at the other end of the ranking."""
    text = Path(AdaSkip.calibrate.__code__.co_filename).read_text(encoding="utf-8")[:2500]
    ids = torch.tensor([tokenizer(text)["input_ids"][:512]])
    stats = AdaSkip.calibrate(model, [ids])
    from skipguide.llm import SublayerPlan
    from skipguide.llm.choose import Sublayers

    def loss(numbers):
        chosen = Sublayers.numbered(numbers, stats.num_layers)
        with SublayerPlan(chosen.attn, chosen.mlp).apply(model, cached=False), torch.no_grad():
            return model(ids, labels=ids, use_cache=False).loss.item()

    order = stats.ranking()
    assert loss([]) < loss(order[:4]) < loss(order[-4:])
