"""Batch: what a user hands over to be measured, as token ids and their mask."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from skipguide.errors import SkipError

Batch = Tensor | Mapping[str, Any] | list[int]


def vocabulary_of(model: nn.Module) -> int | None:
    """How many token ids a model knows: the rows of its embedding, or None where they are not one table."""
    table: Any = None
    with contextlib.suppress(NotImplementedError, AttributeError):  # what transformers raises where there is no table
        table = getattr(model, "get_input_embeddings", lambda: None)()
    return getattr(table, "num_embeddings", None)


def check_batches(batches: Any) -> None:
    """Refuse what is no list of batches: one batch alone, or text.

    Raises:
        SkipError: if it is none.
    """
    if isinstance(batches, (Mapping, str)) or not isinstance(batches, Iterable):
        raise SkipError(
            f"expected a list of batches of token ids; got {type(batches).__name__}: "
            "[tokenizer(text)['input_ids']] is a list of one"
        )


def ids_and_mask(batch: Batch, number: int = 0, vocabulary: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Token ids [B, T], and their mask or None.

    Args:
        batch: token ids [T] or [B, T], or a tokenizer output with `input_ids` and `attention_mask`.
        number: which one of several it is, for errors.
        vocabulary: how many token ids there are; None does not check them.

    Raises:
        SkipError: for what is no batch, and ids outside the vocabulary.

    Example:
        >>> ids_and_mask([5, 6, 7])
        (tensor([[5, 6, 7]]), None)
    """
    if isinstance(batch, Mapping):
        if "input_ids" not in batch:
            raise SkipError(f"expected input_ids in a batch; it has {sorted(batch)} (batch {number})")
        given, mask = batch["input_ids"], batch.get("attention_mask")
    else:
        given, mask = batch, None
    try:
        ids = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise SkipError(
            f"expected token ids [T] or [B, T] (tokenized, and padded where rows differ); got {batch!r} as batch "
            f"{number}"
        ) from None
    ids = ids[None] if ids.dim() == 1 else ids
    numbers = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.dim() != 2 or not numbers or not ids.numel():
        raise SkipError(f"expected token ids [T] or [B, T]; got {tuple(ids.shape)} of {ids.dtype} as batch {number}")
    ids = ids.long()
    if vocabulary is not None:
        _check_ids(ids, number, vocabulary)
    if mask is None:
        return ids, None
    mask = torch.as_tensor(mask)
    mask = mask[None] if mask.dim() == 1 else mask
    if mask.shape != ids.shape:
        raise SkipError(
            f"expected an attention_mask like the token ids, {tuple(ids.shape)}; got {tuple(mask.shape)} in batch "
            f"{number}"
        )
    return ids, mask


def _check_ids(ids: Tensor, number: int, vocabulary: int) -> None:
    """An embedding would say "index out of range", and on a GPU end the process: here it is said which ids."""
    wrong = (ids < 0) | (ids >= vocabulary)
    if not wrong.any():
        return
    found = sorted(set(ids[wrong].tolist()))
    row, place = (int(i) for i in wrong.nonzero()[0])
    shown = ", ".join(map(str, found[:5])) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
    raise SkipError(
        f"expected token ids from 0 to {vocabulary - 1}, the model's vocabulary; batch {number} has {shown}, first in "
        f"row {row} at token {place}. Was it tokenized for another model, or padded with -100 as labels are?"
    )
