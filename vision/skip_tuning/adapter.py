"""Adapters: the tensors that tuning changed, in one safetensors file that also says what they belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from skipguide.config import whole
from skipguide.errors import SkipError
from skipguide.files import parse_json, replacing

FILE, NOTES = "adapter.safetensors", "adapter.json"


def fingerprint(model: nn.Module) -> str:
    """Identifies a model by names, shapes and values of its parameters, whatever their dtype or device."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, Any], *, overwrite: bool) -> None:
    """Write both files under temporary names, then rename.

    The safetensors file alone is what is read again, so that a process killed between two renames leaves either the
    old adapter or the new one. `adapter.json` is a copy of its notes for people.
    """
    target = folder / FILE
    if target.exists() and not overwrite:
        raise SkipError(f"{target} exists; pass overwrite=True to replace it")
    if folder.exists() and not folder.is_dir():
        raise SkipError(f"expected the name of a folder; {folder} is a file")
    text = json.dumps(notes, indent=1)
    with replacing(target, folder / NOTES) as (weights, readable):
        kept = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        save_file(kept, weights, metadata={"skipguide": text})
        readable.write_text(text + "\n", encoding="utf-8")


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and notes.

    Raises:
        SkipError: if there is no adapter, it is damaged, or its notes are not those of `save_adapter`.
    """
    file = folder / FILE if folder.is_dir() else folder
    if not file.is_file():
        raise SkipError(f"expected an adapter ({FILE}) in {folder}; there is none")
    try:
        with safe_open(file, "pt") as opened:
            notes = parse_json((opened.metadata() or {})["skipguide"], f"the notes of {file}")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, KeyError, SkipError, SafetensorError) as error:
        raise SkipError(f"expected an adapter written by save_adapter in {file}; it is damaged ({error})") from error
    _check_notes(notes, file)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise SkipError(f"expected finite numbers in {file}; {name} has others")
    return tensors, notes


def _check_notes(notes: Any, file: Path) -> None:
    """Refuse notes that lack what a tuner is made of, or have it in another form."""
    if not isinstance(notes, Mapping):
        raise SkipError(f"expected the notes of {file} as a mapping; got {type(notes).__name__}: save the adapter anew")
    if whole(notes.get("version")) != 1:
        raise SkipError(f"expected an adapter of version 1; got version {notes.get('version')!r}")
    kinds: dict[str, tuple[Any, str]] = {
        **dict.fromkeys(("model", "name", "fingerprint"), (_is_text, "a text")),
        **dict.fromkeys(("classnames", "templates"), (_are_texts, "a list of texts")),
        "skip_layers": (_are_layers, 'a mapping with "image" and "text"'),
        "class_skip": (lambda value: value is None or isinstance(value, Mapping), "a mapping or null"),
    }
    for name, (fits, what) in kinds.items():
        if name not in notes:
            raise SkipError(f"expected {name} in the notes of {file}; there is none: save the adapter anew")
        if not fits(notes[name]):
            raise SkipError(
                f"expected {name} in the notes of {file} as {what}; got {notes[name]!r}: save the adapter anew"
            )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)


def _are_layers(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and set(value) == {"image", "text"}
        and all(whole(each) is not None for each in value.values())
    )
