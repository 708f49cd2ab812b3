"""Skip guidance on a pipeline of two denoisers: each can have layers of its own."""

import pytest
import torch

from skipguide import SkipError, Timetable
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.pipes import BY_PIPE


def test_each_denoiser_can_have_its_own_layers():
    case = BY_PIPE["wan22"]
    pipe = case.build()
    with Stg({"transformer": [1], "transformer_2": [2]}).apply(pipe) as applied:
        out = case.run(pipe)
    assert applied.layers == {"transformer": (1,), "transformer_2": (2,)}
    with Stg([1]).apply(pipe):
        assert not torch.equal(out, case.run(pipe))
    with pytest.raises(SkipError, match="transformer_2"):
        Stg({"transformer": [1]}).apply(pipe)


def test_each_denoiser_can_have_layers_of_its_own_kind():
    case = BY_PIPE["wan22"]
    pipe, table = case.build(), Timetable([(0.0, (1,)), (0.5, (2,))])
    with Stg({"transformer": table, "transformer_2": [1, 2]}).apply(pipe) as applied:
        case.run(pipe)
    assert applied.layers == {"transformer": (1, 2), "transformer_2": (1, 2)}
    with pytest.raises(SkipError, match="no preset"):
        Stg({"transformer": None, "transformer_2": [1]}).apply(pipe)
