"""What is decided of drafts and single passes: rejecting the impossible, rows that have ended, means of a window."""

from types import SimpleNamespace

import pytest
import torch

from skipguide.llm.online import OnlineWindow
from skipguide.llm.speculative.loop import _common_matches
from skipguide.llm.speculative.verify import Verdict, accept_sampled


def test_a_token_that_the_full_model_never_gives_is_rejected(monkeypatch):
    """Even by a draw of exactly 0, which `torch.rand` can give."""
    monkeypatch.setattr(torch, "rand", lambda shape, **settings: torch.zeros(shape))
    p = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])
    q = torch.tensor([[[1.0, 0.0]]])
    verdict = accept_sampled(torch.tensor([[0]]), q, p)
    assert verdict.matches.tolist() == [0] and verdict.tokens[0, 0] == 1


def test_a_finished_row_accepts_every_draft():
    verdict = Verdict(torch.zeros(3, 5, dtype=torch.long), torch.tensor([3, 0, 2]))
    for unfinished, common in (([1, 0, 1], 2), ([1, 0, 0], 3), ([0, 0, 0], 4), ([1, 1, 1], 0)):
        assert _common_matches(SimpleNamespace(unfinished=torch.tensor(unfinished)), verdict, 4) == common


def test_the_online_similarity_is_the_mean_over_the_window():
    window = OnlineWindow(2, 3, [1])
    before = torch.tensor([[[1.0, 0.0]]])
    for after in (before, torch.tensor([[[0.0, 3.0]]])):
        assert not window.full
        window.enter(1, "mlp", before, after)
        window.seen += 1
    assert window.full
    assert window.decide([0.5, 0.5, 0.5]) == {1: 2.0}
    assert window.similarity[1] == pytest.approx(0.5) and window.scale[1] == pytest.approx(2.0)
