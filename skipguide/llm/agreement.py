"""Agreement: how far a model with sublayers left out is from the whole model, on the same text."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipguide.errors import SkipError
from skipguide.hosts.kv_cache import as_argument, cache_of


@dataclass(frozen=True)
class Agreement:
    """Two next-token distributions at the same places.

    Attributes:
        kl: mean Kullback-Leibler divergence in nats, of the whole model's distribution from the other's.
        top1: share of places where both find the same token most probable.
        tokens: how many places.
    """

    kl: float
    top1: float
    tokens: int

    @classmethod
    def of(cls, whole: Tensor, other: Tensor) -> Agreement:
        """From logits of both, each [T, V].

        Raises:
            SkipError: for logits that are not finite where they are compared.

        Example:
            >>> same = Agreement.of(torch.eye(3), torch.eye(3))
            >>> same.kl, same.top1, same.tokens
            (0.0, 1.0, 3)
        """
        p, q = (logits.double().log_softmax(-1) for logits in (whole, other))
        kl = (p.exp() * (p - q)).sum(-1).mean()
        if not torch.isfinite(kl):
            raise SkipError("the logits hold NaN or inf: nothing can be compared; run the model in float32 or bfloat16")
        same = (whole.argmax(-1) == other.argmax(-1)).double().mean()
        return cls(max(0.0, float(kl)), float(same), len(whole))


@torch.no_grad()
def decoded_logits(model: Any, ids: Tensor, prompt: int) -> Tensor:
    """Logits [T - prompt, V] of every token after the prompt, as decoding sees them: one token at a time, with a cache.

    A policy that skips in decoding only can be told from the whole model in no other way.

    Args:
        model: a causal language model.
        ids: [1, T] token ids.
        prompt: how many of them are the prompt, at least 1.

    Raises:
        SkipError: if there is nothing after the prompt.
    """
    if not 0 < prompt < ids.shape[1]:
        raise SkipError(f"expected a prompt of 1 to {ids.shape[1] - 1} tokens, before the text; got {prompt}")
    out = model(input_ids=ids[:, :prompt], use_cache=True)
    found = [out.logits[0, -1]]
    for place in range(prompt, ids.shape[1] - 1):
        cache = as_argument(model, cache_of(out))
        out = model(input_ids=ids[:, place : place + 1], use_cache=True, **cache)
        found.append(out.logits[0, -1])
    return torch.stack(found)


def agreement(
    model: Any, ids: Tensor, prompt: int, policy: Callable[[Any], AbstractContextManager[Any]] | None
) -> Agreement:
    """Compare a policy with the whole model on a text.

    Args:
        model: a causal language model, with nothing left out of it.
        ids: [1, T] token ids: the prompt and a text.
        prompt: how many of them are the prompt.
        policy: `lambda model: config.apply(model)`; None compares the model with itself.

    Raises:
        SkipError: see `decoded_logits` and `Agreement.of`.
    """
    whole = decoded_logits(model, ids, prompt)
    with nullcontext() if policy is None else policy(model):
        other = decoded_logits(model, ids, prompt)
    return Agreement.of(whole, other)
