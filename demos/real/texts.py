"""Texts of three kinds, cut into windows of tokens: English to calibrate on and to test on, code, and chat."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from demos.benchmarks.measure import write_json
from demos.bundled_lm.evaluate import held_out_texts
from demos.real.pictures import data_file
from skipguide.cli.llm_models import LanguageModel

QUESTIONS = (
    "What is a residual network?",
    "Write a short letter to a friend about a walk in the mountains.",
    "Explain to a child why the sky is blue.",
    "Give me a recipe for potato soup.",
    "How do I plan a week of meals on a small budget?",
    "What happened in the French Revolution?",
    "Write a Python function that counts the words of a text.",
    "Which animals sleep through the winter, and why?",
)
ANSWER = 160  # tokens of a chat answer at most


def english(part: str) -> str:
    """WikiText-2, `"valid"` or `"test"`, as people write: its marks around punctuation are taken back.

    Raises:
        NotInstalledError: without `../shared/data/wikitext2`.
    """
    return readable(data_file(f"wikitext2/{part}.txt").read_text(encoding="utf-8"))


def readable(text: str) -> str:
    """The text without the spaces that WikiText puts around punctuation.

    Example:
        >>> readable(" = Gold @-@ dust = \\n ( It 's 1 @,@ 000 , or more . )")
        '= Gold-dust =\\n(It\\'s 1,000, or more.)'
    """
    for old, new in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" n't", "n't")):
        text = text.replace(old, new)
    text = re.sub(r" ([,.;:!?)\]%]|'s\b|'re\b|'ve\b|'ll\b|'d\b|'m\b)", r"\1", text)
    text = re.sub(r"([(\[$]) ", r"\1", text)
    text = re.sub(r'" (.*?) "', r'"\1"', text)
    return re.sub(r" *\n *", "\n", text).strip()


def windows(lm: LanguageModel, texts: Iterable[str], tokens: int) -> list[Tensor]:
    """All whole windows [tokens] of the texts, one text after the other."""
    rows = [lm.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0] for text in texts if text.strip()]
    return [piece for row in rows for piece in row.split(tokens) if len(piece) == tokens]


def spaced(pieces: list[Tensor], count: int) -> Tensor:
    """`count` of the windows, evenly over all: [count, tokens]."""
    picked = torch.linspace(0, len(pieces) - 1, min(count, len(pieces))).round().long().tolist()
    return torch.stack([pieces[i] for i in picked])


def code(lm: LanguageModel, tokens: int, count: int) -> Tensor:
    """Windows of files of Python's standard library, at most one of a file."""
    firsts = (windows(lm, [text[: 16 * tokens]], tokens)[:1] for _, text in held_out_texts())
    return spaced([piece for pieces in firsts for piece in pieces], count)


@torch.no_grad()
def chat(lm: LanguageModel, tokens: int, count: int, kept: Path) -> Tensor:
    """Windows of conversations: questions in the model's chat template, and the whole model's own greedy answers.

    Args:
        lm: the model.
        tokens: of a window.
        count: of windows.
        kept: a JSON file, where the answers are kept.
    """
    import json

    if not kept.exists():
        answers = []
        # no more than the windows hold: an answer is shorter than a question and an answer
        for question in tqdm(QUESTIONS[: 1 + tokens * count // ANSWER], desc="chat"):
            ids = lm.encode_chat(question)
            out = lm.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, do_sample=False,
                repetition_penalty=1.1,
            )  # fmt: skip
            answers.append(out[0].tolist())
        write_json(kept, {"ids": answers})
    found: list[list[int]] = json.loads(kept.read_text(encoding="utf-8"))["ids"]
    row = torch.tensor([token for ids in found for token in ids])
    return spaced([piece for piece in row.split(tokens) if len(piece) == tokens], count)
