"""Self-speculative sampling has the full model's distribution; verdicts on paper."""

import math

import pytest
import torch
from helpers import drafting
from helpers.drafting import DRAFTS, SETS, VOCABULARY, prompt

from skipguide.llm import SelfSpeculative
from skipguide.llm.speculative.verify import accept_greedy, accept_sampled

models, llama = drafting.models, drafting.llama


def test_rejection_sampling_draws_from_the_full_model():
    """Exact in distribution: chi-square of the first two tokens of 40,000 seeded rounds, far drafter and near."""
    generator, count = torch.Generator().manual_seed(0), 40_000
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]])
    for q in (torch.tensor([[0.05, 0.15, 0.3, 0.5]]), torch.tensor([[0.45, 0.35, 0.1, 0.1]]), p[:1]):
        q = torch.cat([q, q.flip(1)])
        drafted = torch.stack(
            [torch.multinomial(row, count, replacement=True, generator=generator) for row in q], dim=1
        )
        verdict = accept_sampled(drafted, q.expand(count, 2, 4), p.expand(count, 3, 4), generator)
        first = verdict.tokens[:, 0].bincount(minlength=4)
        second = verdict.tokens[verdict.matches >= 1, 1].bincount(minlength=4)
        for found, expected in ((first, p[0]), (second, p[1])):
            expected = expected * found.sum()
            assert float(((found - expected) ** 2 / expected).sum()) < 16.3  # 99.9 % of chi-square, 3 degrees
        assert float((verdict.matches >= 1).float().mean()) == pytest.approx(
            float(torch.minimum(p[0], q[0]).sum()), abs=0.02
        )


def test_sampled_text_has_the_full_models_distribution(llama):
    """Third new token of 3,000 seeded continuations, drafted against plain, by a two-sample chi-square."""
    torch.manual_seed(1)
    rows = prompt(1).expand(3000, -1)
    call = {"max_new_tokens": 3, "do_sample": True, "top_k": 6, "temperature": 0.8}
    spec = SelfSpeculative(plan=SETS["most"], adaptive=False, max_draft=2)
    plain = llama.generate(rows, **call)[:, -1].bincount(minlength=VOCABULARY)
    drafted = spec.generate(llama, rows, **call)[:, -1].bincount(minlength=VOCABULARY)
    seen = plain + drafted > 20
    statistic = float(((plain - drafted)[seen] ** 2 / (plain + drafted)[seen]).sum())
    degrees = int(seen.sum()) - 1
    assert degrees >= 3
    assert statistic < degrees + 4 * math.sqrt(2 * degrees)


def test_sampling_can_be_repeated(llama):
    def run():
        torch.manual_seed(3)
        return DRAFTS.generate(llama, prompt(1, rows=2), max_new_tokens=12, do_sample=True)

    assert torch.equal(run(), run())


def test_greedy_verdicts():
    scores = torch.eye(5)[torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0]])]
    verdict = accept_greedy(torch.tensor([[1, 2, 3], [1, 0, 0]]), scores)
    assert verdict.matches.tolist() == [3, 0]
    assert verdict.tokens.tolist() == [[1, 2, 3, 4], [0, 0, 0, 0]]
