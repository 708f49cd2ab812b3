"""A Skipper whose block ended without a pass says so."""

import logging
import threading

import pytest
import torch
from torch import nn

from skipguide import BlockSpec, SkipError, Skipper, SkipPlan, find_blocks, register_blocks


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


register_blocks(Small, BlockSpec("layers", streams=("input",)))


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    monkeypatch.setattr("skipguide.skipper.has_compiled", lambda: False)


def test_nothing_was_called(caplog):
    model = Small()
    with caplog.at_level(logging.WARNING), Skipper(model, SkipPlan([1])):
        Small()(torch.ones(1, 4))  # another one
    assert "Small was never called" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        with Skipper(model, SkipPlan([1])):
            model(torch.ones(1, 4))
        with Skipper(model, SkipPlan()):
            pass
        with pytest.raises(KeyError), Skipper(model, SkipPlan([1])):
            raise KeyError
    assert not caplog.records


def test_it_ran_in_another_thread(caplog):
    model = Small()
    with caplog.at_level(logging.WARNING), Skipper(model, SkipPlan([1])):
        thread = threading.Thread(target=model, args=(torch.ones(1, 4),))
        thread.start()
        thread.join(60)
    assert "Small was never called under its plan: all 1 passes ran with the whole model, in threads" in caplog.text
    assert "forward" not in model.__dict__


def test_replicas_are_refused_by_name():
    parallel = nn.DataParallel(Small())
    assert len(find_blocks(parallel)) == 3, "on one device nothing is replicated"
    parallel.device_ids = [0, 1]
    with pytest.raises(SkipError, match=r"nn\.DataParallel makes replicas"):
        find_blocks(parallel)
