"""Verify: how much of a draft the full model accepts. Pure functions on tensors.

With B rows, k drafted tokens and a vocabulary of V, the full model's scores are [B, k+1, V]: at each drafted token and
at the one after the last. Both rules give, per row, the number of drafted tokens that stay and one token more.

Source: Fast Inference from Transformers via Speculative Decoding (arXiv 2211.17192), algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Verdict:
    """What the full model says about a draft.

    Attributes:
        tokens: [B, k+1] int64; in row b the first `matches[b] + 1` are valid.
        matches: [B] int64, how many drafted tokens were accepted in a row, from the first.
    """

    tokens: Tensor
    matches: Tensor


def accept_greedy(drafted: Tensor, scores: Tensor) -> Verdict:
    """Accept what the full model would have chosen itself.

    Args:
        drafted: [B, k] int64.
        scores: [B, k+1, V] of the full model, processed.

    Example:
        >>> scores = torch.eye(4)[[1, 2, 0]][None]           # the full model wants 1, 2, 0
        >>> verdict = accept_greedy(torch.tensor([[1, 3]]), scores)
        >>> verdict.tokens.tolist(), verdict.matches.tolist()
        ([[1, 2, 0]], [1])
    """
    chosen = scores.argmax(dim=-1)
    same = (drafted == chosen[:, :-1]).to(torch.int64)
    return Verdict(chosen, same.cumprod(dim=1).sum(dim=1))


def accept_sampled(
    drafted: Tensor, draft_probabilities: Tensor, probabilities: Tensor, generator: torch.Generator | None = None
) -> Verdict:
    """Accept by rejection sampling: what comes out is distributed exactly as the full model's samples.

    A drafted token x stays with probability min(1, p(x) / q(x)); at the first that does not, a token is drawn from
    max(p - q, 0), normalised; if all stay, one is drawn from p after the last.

    Args:
        drafted: [B, k] int64, drawn from q.
        draft_probabilities: [B, k, V], the drafter's q.
        probabilities: [B, k+1, V], the full model's p.
        generator: of the random numbers; None takes torch's own.

    Example:
        >>> p = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
        >>> accept_sampled(torch.tensor([[1]]), torch.tensor([[[0.5, 0.5]]]), p).tokens.tolist()
        [[1, 0]]
    """
    p_drafted = probabilities[:, :-1].gather(-1, drafted[..., None])[..., 0]
    q_drafted = draft_probabilities.gather(-1, drafted[..., None])[..., 0]
    draws = torch.rand(p_drafted.shape, generator=generator, device=drafted.device, dtype=p_drafted.dtype)
    stays = (draws * q_drafted < p_drafted).to(torch.int64)
    matches = stays.cumprod(dim=1).sum(dim=1)

    rows = torch.arange(len(drafted), device=drafted.device)
    p = probabilities[rows, matches]
    q = torch.nn.functional.pad(draft_probabilities, (0, 0, 0, 1))[rows, matches]  # nothing was drafted after the last
    rest = (p - q).clamp_min(0.0)
    # p equal to q up to rounding: nothing is left over, and a rejection was rounding too
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p)
    tokens = torch.nn.functional.pad(drafted, (0, 1))
    tokens[rows, matches] = torch.multinomial(rest, 1, generator=generator)[:, 0]
    return Verdict(tokens, matches)
