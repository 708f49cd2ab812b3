"""A picture of a floor plan has its rooms, their names and a legend."""

import numpy as np
import pytest
import torch

from skipguide.errors import SkipError
from skipguide.vision.floorplan import IGNORE, STRUCTURE, draw_plan, generate_plan


def test_picture_has_rooms_names_and_legend():
    plan = generate_plan(3, 64)
    bare = draw_plan(plan.target, labels=False, legend=False)
    assert bare.height == bare.width == 384
    named = draw_plan(plan.target, legend=False)
    assert named.size == bare.size
    assert named.tobytes() != bare.tobytes()
    zoom = bare.height // 64
    walls = (plan.target == STRUCTURE).numpy().repeat(zoom, 0).repeat(zoom, 1)
    assert np.array_equal(np.asarray(named)[walls], np.asarray(bare)[walls]), "a name leaves its room"
    full = draw_plan(plan.target, title="A made-up plan")
    assert full.width > bare.width
    assert full.height > bare.height
    logits = torch.nn.functional.one_hot(plan.target, 11).permute(2, 0, 1).float()
    assert draw_plan(logits).tobytes() == draw_plan(plan.target).tobytes()
    draw_plan(torch.full((3, 3), IGNORE))
    with pytest.raises(SkipError, match="expected classes"):
        draw_plan(torch.rand(3, 3))
    with pytest.raises(SkipError, match="expected classes"):
        draw_plan(plan.target[None])  # classes of a batch are no logits
