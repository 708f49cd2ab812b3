"""The training text: the source of Python's own standard library, which is on every machine.

Whole files are held out, chosen by a hash of their path, so that the split is the same everywhere.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END, PAD = "<|endoftext|>", "<|pad|>"
TABLES = ("encodings/cp", "encodings/mac_", "encodings/iso", "encodings/koi8", "pydoc_data", "site-packages")
HELD_OUT_IN = 20


def held_out(name: str) -> bool:
    """Whether a file (path within the library, with forward slashes) is never trained on: one in twenty."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % HELD_OUT_IN == 0


def files(tests: bool = False) -> Iterator[tuple[str, str]]:
    """Name and text of every library file, in order: without its tests, or only its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(part in name for part in TABLES):
            continue
        if tests != any(part in ("test", "tests", "idle_test") for part in Path(name).parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield name, text


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text goes in and comes back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> NDArray[np.uint16]:
    """One stream of token ids, each file between end marks."""
    end = tokenizer.convert_tokens_to_ids(END)
    stream = [end]
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        stream += [*ids, end]
    return np.array(stream, dtype=np.uint16)
