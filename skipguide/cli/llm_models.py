"""From what the user calls a language model to the model, its tokenizer and a text to measure it on."""

from __future__ import annotations

import argparse
import csv
import inspect
import json.decoder
import shlex
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipguide.cli import models
from skipguide.errors import SkipError

BUNDLED_LM = "tiny-lm"
# what the bundled model writes is Python, so that is what it is measured on
STANDARD_TEXTS = (argparse, json.decoder, textwrap, statistics, shlex, csv)


@dataclass(frozen=True)
class LanguageModel:
    """A loaded causal language model.

    Attributes:
        name: what the user called it.
        model: the model, in eval mode, on the device.
        tokenizer: its tokenizer.
        device: where it is.
        dtype: its precision.
    """

    name: str
    model: Any
    tokenizer: Any
    device: str
    dtype: str

    def encode(self, text: str) -> Any:
        """[1, T] token ids of a prompt.

        Raises:
            SkipError: for a text without a token.
        """
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        if ids.shape[1] == 0:
            raise SkipError("the prompt holds no token: give it a word at least")
        return ids.to(self.device)

    def windows(self, texts: Sequence[str], tokens: int, count: int) -> list[Any]:
        """At most `count` pieces [1, T] of `tokens` token ids from the texts, each text in its turn.

        Raises:
            SkipError: if the texts hold less than two tokens.
        """
        rows = [
            self.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0] for text in texts if text.strip()
        ]
        pieces: list[Any] = []
        for start in range(0, max((len(row) for row in rows), default=0), tokens):
            pieces += [row[start : start + tokens] for row in rows if len(row) - start >= min(tokens, len(row), 2)]
        found = [piece[None].to(self.device) for piece in pieces if len(piece) >= 2][:count]
        if not found:
            raise SkipError("the text holds less than two tokens: nothing can be measured on it")
        return found

    def describe(self) -> dict[str, Any]:
        """What is noted of the model next to a result."""
        return {
            "name": self.name,
            "class": type(self.model).__name__,
            "layers": self.model.config.get_text_config().num_hidden_layers,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "device": self.device,
            "dtype": self.dtype,
        }


def load(name: str, device: str, dtype: str) -> LanguageModel:
    """Load a bundled model, a folder, or a hub id.

    Raises:
        SkipError: if it is none of these, or no causal language model with a tokenizer.
    """
    source = models.resolve(name, BUNDLED_LM, "Qwen/Qwen3-0.6B")
    if source.folder is not None and not (source.folder / "config.json").is_file():
        raise SkipError(f"{name} is not a language model: it has no config.json")
    device = models.choose_device(device)
    dtype = models.choose_dtype(dtype, device, bundled=source.bundled)
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    where: Any = source.folder or source.name
    with models.loading(name, "a causal language model with a tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(where)
        model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, dtype))
    return LanguageModel(source.name, model.to(device).eval(), tokenizer, device, dtype)


def texts(path: Path | None) -> list[str]:
    """The text to measure on: a file's, or the source of a few modules of the standard library.

    Raises:
        SkipError: if the file cannot be read as text.
    """
    if path is None:
        return [inspect.getsource(module) for module in STANDARD_TEXTS]
    try:
        return [path.read_text(encoding="utf-8")]
    except (OSError, UnicodeDecodeError) as error:
        raise SkipError(f"cannot read {path} as text: {error}") from error
