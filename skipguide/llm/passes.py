"""Passes: what one call of the decoder is about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from skipguide.arguments import Arguments
from skipguide.errors import SkipError
from skipguide.hosts.generation import stage
from skipguide.hosts.kv_cache import cache_of, given_cache

Said = Literal["prefill", "decode"]
_SAID: ContextVar[Said | None] = ContextVar("skipguide_said_phase", default=None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, without gradients; afterwards every module is in the mode that it was in, which need not be one."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def said(phase: Said) -> Iterator[None]:
    """Inside, passes of several tokens on a filled cache are of this phase, in this thread or task."""
    if phase not in ("prefill", "decode"):
        raise SkipError(f'expected phase "prefill" or "decode"; got {phase!r}')
    token = _SAID.set(phase)
    try:
        yield
    finally:
        _SAID.reset(token)


def decodes(tokens: int, decoded: bool) -> bool | None:
    """Whether a pass on a filled cache decodes, or else reads a prompt; None where nobody says so.

    What was `said` goes first. `generate` knows whether it reads a prompt, of which the last chunk can be a single
    token, or verifies a draft of several. In other loops one token is decoded.

    Args:
        tokens: of the pass, per row.
        decoded: whether tokens were decoded on the cache. Then a `generate` that is given a single one goes on with
            the text that it has written.
    """
    if torch.compiler.is_compiling():  # a graph is made once for all who call it
        return True if tokens == 1 else None
    if (phase := _SAID.get()) is not None:
        return phase == "decode"
    if (found := stage()) is not None:
        return found == "decode" or (found == "prompt" and tokens == 1 and decoded)
    return True if tokens == 1 else None


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    Attributes:
        batch: rows.
        tokens: tokens per row in this pass.
        decode: tokens of a sequence that runs already, one or, where drafts are verified, several; False is prefill,
            also of a later chunk of a prompt.
        fresh: the first pass of a sequence.
        mask: bool `[B, T]`, True for tokens that are no padding; None if all are.
        cache: the KV cache, or None.
    """

    batch: int
    tokens: int
    decode: bool
    fresh: bool
    mask: Tensor | None
    cache: Any


class PassReader:
    """Reads the arguments of a decoder."""

    __slots__ = ("arguments",)

    def __init__(self, decoder: nn.Module) -> None:
        self.arguments = Arguments(decoder)

    def shape(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
        """Rows and tokens of the pass."""
        for name in ("input_ids", "inputs_embeds"):
            if (given := self.arguments.get(name, args, kwargs)) is not None:
                return given.shape[0], given.shape[1]
        raise SkipError("a pass of a language model has input_ids or inputs_embeds; got neither")

    def tokens(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Tokens per row."""
        return self.shape(args, kwargs)[1]

    def cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The KV cache that was given, or None."""
        return given_cache(self.arguments, args, kwargs)

    @staticmethod
    def made(out: Any) -> Any:
        """The KV cache that the decoder made itself, or None."""
        found = cache_of(out)
        if found is None and isinstance(out, tuple):
            found = next((item for item in out if hasattr(item, "get_seq_length")), None)
        return found

    def mask(self, args: tuple[Any, ...], kwargs: dict[str, Any], fresh: bool) -> Tensor | None:
        """True for the tokens of this pass that are no padding, bool `[B, T]`; None if nothing says so.

        `generate` gives static caches a mask that is made already, `[B, 1, T, keys]`: the last token of a prompt sees
        all that is no padding.
        """
        given = self.arguments.get("attention_mask", args, kwargs)
        if isinstance(given, dict):
            given = given.get("full_attention")
        if not isinstance(given, Tensor):
            return None
        tokens = self.tokens(args, kwargs)
        if given.dim() == 2:
            return given[:, -tokens:].bool()
        if given.dim() == 4 and fresh and given.shape[-2] == tokens:
            seen = given[:, 0, -1, :tokens]
            return seen if seen.dtype == torch.bool else seen == 0
        return None

    def describe(self, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any, decode: bool, fresh: bool) -> Pass:
        """The pass, in words."""
        batch, tokens = self.shape(args, kwargs)
        return Pass(batch, tokens, decode, fresh, self.mask(args, kwargs, fresh), cache)
