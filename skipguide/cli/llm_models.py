"""From what the user calls a language model to the model, its tokenizer and a text to measure it on."""

from __future__ import annotations

import argparse
import csv
import inspect
import json.decoder
import shlex
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from skipguide.cli import models
from skipguide.cli.outputs import check_output, replacing, write_json
from skipguide.errors import SkipError

BUNDLED_LM = "tiny-lm"
# what the bundled model writes is Python, so that is what it is measured on
PIECES, PIECE_TOKENS = 12, 256  # how much of a text is measured
SEARCH_PIECES, SEARCH_TOKENS = 4, 128  # and how much by a search, which takes a hundred passes over it
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

    def encode_chat(self, text: str) -> Any:
        """[1, T] token ids of a question, as the model's chat template puts it to the model.

        Raises:
            SkipError: for a tokenizer without a template.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            raise SkipError(f"--chat needs a chat template, and the tokenizer of {self.name} has none")
        said = [{"role": "user", "content": text}]
        found = self.tokenizer.apply_chat_template(
            said, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return found["input_ids"].to(self.device)

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
    """Load a bundled model, a folder, a hub id, or a .gguf file, whose quantised weights become `dtype` again.

    Raises:
        SkipError: if it is none of these, or no causal language model with a tokenizer.
    """
    file: dict[str, str] = {}
    if Path(name).suffix.lower() == ".gguf" and (path := Path(name).expanduser()).is_file():
        if find_spec("gguf") is None:
            raise SkipError("reading a .gguf file needs the package gguf: pip install gguf")
        source, file = models.Source(name, path.parent), {"gguf_file": path.name}
    else:
        source = models.resolve(name, BUNDLED_LM, "Qwen/Qwen3-0.6B, or a .gguf file")
    if source.folder is not None and not file and not (source.folder / "config.json").is_file():
        raise SkipError(f"{name} is not a language model: it has no config.json")
    device = models.choose_device(device)
    dtype = models.choose_dtype(dtype, device, bundled=source.bundled)
    import torch
    import transformers

    models.loading_bars(source)
    where: Any = source.folder or source.name
    with models.loading(name, "a causal language model with a tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **file)
        model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, dtype), **file)
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


def statistics_of(
    lm: LanguageModel, text: Path | None, file: Path | None, pieces: int = PIECES, tokens: int = PIECE_TOKENS
) -> Any:
    """The model's similarities (`SublayerStats`): read from a file, or measured, and then kept in it.

    Args:
        lm: the model.
        text: what to measure on; None takes the standard texts.
        file: with the statistics of an earlier run; where there is none, they are written to it.
        pieces: of the text.
        tokens: of a piece.

    Raises:
        SkipError: for a text that would not be read, a file of something else, or a text that cannot be measured.
    """
    from skipguide.llm import AdaSkip, SublayerStats

    return _measured(
        text, file, SublayerStats, lambda: AdaSkip.calibrate(lm.model, lm.windows(texts(text), tokens, pieces))
    )


def order_of(lm: LanguageModel, text: Path | None, file: Path | None, most: int) -> Any:
    """The order in which a search leaves sublayers out (`SkipOrder`): read from a file, or measured and kept in it.

    Args:
        lm: the model.
        text: what to measure on; None takes the standard texts.
        file: with the order of an earlier run; where there is none, it is written to it.
        most: how many sublayers to leave out.

    Raises:
        SkipError: as of `statistics_of`.
    """
    from skipguide.llm import MeasuredSkip, SkipOrder

    return _measured(
        text,
        file,
        SkipOrder,
        lambda: MeasuredSkip.calibrate(lm.model, lm.windows(texts(text), SEARCH_TOKENS, SEARCH_PIECES), most),
    )


def _measured(text: Path | None, file: Path | None, kind: Any, measure: Callable[[], Any]) -> Any:
    if file is not None and file.exists():
        if text is not None:
            raise SkipError(f"--text does nothing: {file} holds statistics already. Leave out one of the two")
        return kind.load_json(file)
    if file is not None:
        check_output(file, (".json",), force=False, notes=False)
    found = measure()
    if file is not None:
        with replacing(file) as (new,):
            write_json(new, found.to_dict())
    return found
