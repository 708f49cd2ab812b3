"""A prefix: what a pass captured, for some rows, filled from another and let go of."""

import pytest
import torch
from torch import nn

from skipguide import SkipError
from skipguide.prefix import Prefix
from skipguide.skipper import resume


def prefix():
    """Three clips; the stream `frames` folds two frames into the batch."""
    clips, frames = torch.arange(3.0)[:, None], torch.arange(6.0)[:, None]
    return Prefix(2, {"clips": clips, "frames": frames, "none": None}, {"block.0": (clips, [frames, None])})


def test_some_rows_as_views():
    whole = prefix()
    some = whole.select(slice(1, 3), 3)
    assert some.layer == 2
    assert some.streams["clips"].flatten().tolist() == [1, 2]
    assert some.streams["frames"].flatten().tolist() == [2, 3, 4, 5]
    assert some.streams["none"] is None
    clips, (frames, none) = some.kept["block.0"]
    assert clips.flatten().tolist() == [1, 2] and frames.flatten().tolist() == [2, 3, 4, 5] and none is None
    assert isinstance(some.kept["block.0"], tuple) and isinstance(some.kept["block.0"][1], list)
    assert some.streams["clips"].data_ptr() == whole.streams["clips"][1:].data_ptr(), "nothing is copied"
    last = whole.select(slice(-1, None), 3)
    assert last.streams["frames"].flatten().tolist() == [4, 5]


def test_filled_and_let_go_of():
    whole, other = prefix(), Prefix(2)
    other.fill(whole)
    assert other.streams == whole.streams and other.kept == whole.kept
    whole.clear()
    assert not whole.streams and not whole.kept
    assert len(other.streams) == 3 and len(other.kept) == 1


def test_nothing_was_captured():
    empty = Prefix(4)
    for use in (lambda: empty.select(slice(0, 1), 1), lambda: resume(nn.Linear(1, 1), empty)):
        with pytest.raises(SkipError, match="nothing was captured at block 4: run the model once inside capture"):
            use()
