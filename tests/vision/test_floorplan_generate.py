"""Made-up floor plans keep their rules, and are repeatable."""

import networkx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipguide.errors import SkipError
from skipguide.vision.floorplan import BACKGROUND, STRUCTURE, ZONES, collate, generate_plan
from skipguide.vision.floorplan.generate import PROGRAMMES
from skipguide.vision.floorplan.regions import regions


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(24, 70))
def test_made_up_plans_keep_their_rules(seed, size):
    plan = generate_plan(seed, size)
    target = plan.target.numpy()
    graph = plan.graph.to_networkx()
    assert networkx.is_connected(graph)
    rooms = regions(target)
    areas = {}
    for number in np.unique(rooms):
        kind = int(target.ravel()[number])
        if kind < STRUCTURE:
            areas[number] = (int((rooms == number).sum()), kind)
    assert len(areas) == len(plan.graph) >= 2
    # zones go by rank in size, in the order of the programme
    order = PROGRAMMES[plan.name.split("-")[0]]
    ranked = sorted(areas.values(), reverse=True)
    assert sorted(plan.graph.zones.tolist()) == sorted(order[: len(ranked)])
    sizes = [area for area, _ in ranked]
    for rank, (area, kind) in enumerate(ranked):
        if sizes.count(area) == 1:
            assert kind in ZONES[order[rank]]
    # what a room is within its zone goes by the number of its connections
    kinds = sorted(kind for _, kind in areas.values())
    table = {0: (0, 0, 0, 0), 1: (2, 3, 1, 4), 2: (7, 6, 5, 5), 3: (8, 8, 8, 8)}
    zones = plan.graph.zones.tolist()
    assert kinds == sorted(table[zones[r]][min(graph.degree[r], 4) - 1] for r in graph.nodes)
    # the image: the outside is exactly the background
    assert torch.equal(plan.image[1] == 1, plan.target == BACKGROUND)


def test_plans_are_repeatable_and_differ():
    one, two, other = generate_plan(5), generate_plan(5), generate_plan(6)
    assert torch.equal(one.image, two.image)
    assert torch.equal(one.target, two.target)
    assert torch.equal(one.graph.edges, two.graph.edges)
    assert not torch.equal(one.target, other.target)
    named = [generate_plan(7, programme=name) for name in PROGRAMMES]
    assert len({tuple(plan.target.flatten().tolist()) for plan in named}) == 3
    # nothing in the image tells the programme
    assert len({tuple(plan.image[1].flatten().tolist()) for plan in named}) == 1
    whole = generate_plan(7, keep_walls=1.0)
    assert torch.equal(whole.image[2] == 0, whole.target == STRUCTURE)
    for arguments, message in (
        ({"size": 8}, "24"),
        ({"rooms": (1, 4)}, "2 to 8"),
        ({"rooms": (5, 4)}, "2 to 8"),
        ({"keep_walls": 2.0}, "keep_walls"),
        ({"programme": "castle"}, "family"),
    ):
        with pytest.raises(SkipError, match=message):
            generate_plan(0, **arguments)
    with pytest.raises(SkipError, match="one size"):
        collate([generate_plan(0, 24), generate_plan(0, 32)])
