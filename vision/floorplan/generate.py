"""Plans made up by rules, with their graphs: what a net can learn from the image, and what from the graph alone.

The image shows all outer walls and some pixels of the inner ones. Which zone a room belongs to follows from its rank
by size and from the plan's programme (family, office, clinic), which nothing in the image gives away. What a room is
within its zone follows from the number of its connections. So the image alone cannot be right, and connections matter.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from skipguide.errors import SkipError
from skipguide.vision.floorplan.graph import EDGE_TYPES, LayoutGraph
from skipguide.vision.floorplan.msd import preprocess
from skipguide.vision.floorplan.plan import BACKGROUND, STRUCTURE, Plan

# Zone of each room, from the largest on.
PROGRAMMES = {
    "family": (1, 0, 0, 1, 2, 2, 3, 2),
    "office": (2, 1, 1, 2, 1, 0, 1, 3),
    "clinic": (0, 2, 2, 0, 0, 2, 1, 0),
}
# What a room of the zone is with 1, 2, 3 and more connections.
ROOMS = ((0, 0, 0, 0), (2, 3, 1, 4), (7, 6, 5, 5), (8, 8, 8, 8))

Rectangle = tuple[int, int, int, int]  # top, left, bottom, right; the last two excluded


def generate_plan(
    seed: int,
    size: int = 32,
    rooms: tuple[int, int] = (4, 8),
    programme: str | None = None,
    keep_walls: float = 0.6,
) -> Plan:
    """Make up a plan; equal arguments give equal plans.

    Args:
        seed: which one.
        size: side of the image in pixels, at least 24.
        rooms: least and most rooms, up to 8; a small building may have fewer.
        programme: "family", "office" or "clinic"; by chance if None.
        keep_walls: share of the inner walls' pixels that the image shows.

    Raises:
        SkipError: for arguments out of range.

    Example:
        >>> plan = generate_plan(3)
        >>> plan.image.shape, plan.target.shape, len(plan.graph) >= 2
        (torch.Size([3, 32, 32]), torch.Size([32, 32]), True)
    """
    if size < 24:
        raise SkipError(f"expected a size of at least 24 pixels; got {size}")
    if not 2 <= rooms[0] <= rooms[1] <= 8:
        raise SkipError(f"expected 2 to 8 rooms, least and most; got {rooms}")
    if not 0 <= keep_walls <= 1:
        raise SkipError(f"expected keep_walls in 0..1; got {keep_walls}")
    if programme is not None and programme not in PROGRAMMES:
        raise SkipError(f"expected a programme out of {sorted(PROGRAMMES)}; got {programme!r}")
    rng = np.random.default_rng(seed)
    chosen = programme or str(rng.choice(sorted(PROGRAMMES)))
    wall = max(1, size // 64)
    top, left, under, after = (int(v) for v in rng.integers(1, size // 8 + 1, 4))
    building = (top, left, size - under, size - after)
    inside = (top + wall, left + wall, size - under - wall, size - after - wall)
    spaces = _split(rng, inside, int(rng.integers(rooms[0], rooms[1] + 1)), wall, max(3, size // 8))

    order = sorted(range(len(spaces)), key=lambda r: (-_area(spaces[r]), r))
    zones = [0] * len(spaces)
    for rank, room in enumerate(order):
        zones[room] = PROGRAMMES[chosen][rank]
    where = np.full((size, size), -1)
    for room, (t, le, b, r) in enumerate(spaces):
        where[t:b, le:r] = room
    pairs = _connect(rng, where, wall)
    degree = np.bincount(np.array(pairs, dtype=np.int64).ravel(), minlength=len(spaces))
    kinds = [ROOMS[zone][min(max(int(d), 1), 4) - 1] for zone, d in zip(zones, degree, strict=True)]
    types = [_edge_type(zones[a], zones[b], kinds[a], kinds[b]) for a, b in pairs]

    target = np.full((size, size), BACKGROUND)
    target[building[0] : building[2], building[1] : building[3]] = STRUCTURE
    outer_walls = target == STRUCTURE
    outer_walls[inside[0] : inside[2], inside[1] : inside[3]] = False
    target[where >= 0] = np.array(kinds)[where[where >= 0]]
    walls = outer_walls | ((target == STRUCTURE) & (rng.random((size, size)) < keep_walls))

    # The order of the rooms must not tell where they are.
    shuffled = rng.permutation(len(spaces))
    place = np.argsort(shuffled)
    edges = torch.tensor([[int(place[a]), int(place[b])] for a, b in pairs], dtype=torch.long).reshape(-1, 2).T
    graph = LayoutGraph(torch.tensor([zones[r] for r in shuffled]), edges, torch.tensor(types, dtype=torch.long))
    image = preprocess(np.where(walls, 0, 255))
    return Plan(image, graph, torch.from_numpy(target.astype(np.int64)), f"{chosen}-{seed}")


def _area(space: Rectangle) -> int:
    return (space[2] - space[0]) * (space[3] - space[1])


def _split(rng: np.random.Generator, inside: Rectangle, count: int, wall: int, least: int) -> list[Rectangle]:
    """Cut the largest space that can be cut, across its longer side, until there are enough."""
    spaces = [inside]
    while len(spaces) < count:
        able = [s for s in spaces if max(s[2] - s[0], s[3] - s[1]) >= 2 * least + wall]
        if not able:
            break
        space = max(able, key=_area)
        top, left, bottom, right = space
        tall = bottom - top >= right - left
        start, stop = (top, bottom) if tall else (left, right)
        cut = int(rng.integers(start + least, stop - least - wall + 1))
        spaces.remove(space)
        if tall:
            spaces += [(top, left, cut, right), (cut + wall, left, bottom, right)]
        else:
            spaces += [(top, left, bottom, cut), (top, cut + wall, bottom, right)]
    return spaces


def _connect(rng: np.random.Generator, where: NDArray[np.int64], wall: int) -> list[tuple[int, int]]:
    """Pairs of neighbours: as many as it takes to reach every room, and some more."""
    near = wall + 1
    contact: dict[tuple[int, int], int] = {}
    for a, b in ((where[near:], where[:-near]), (where[:, near:], where[:, :-near])):
        both = (a >= 0) & (b >= 0) & (a != b)
        for one, other in zip(a[both].tolist(), b[both].tolist(), strict=True):
            key = (min(one, other), max(one, other))
            contact[key] = contact.get(key, 0) + 1
    neighbours = sorted(pair for pair, length in contact.items() if length >= 2)
    group = {room: room for room in range(int(where.max()) + 1)}
    kept = []
    for at in rng.permutation(len(neighbours)):
        one, other = neighbours[at]
        joins = group[one] != group[other]
        if joins:
            old, new = group[one], group[other]
            group = {room: new if g == old else g for room, g in group.items()}
        if joins or rng.random() < 0.35:
            kept.append((one, other))
    return kept


def _edge_type(zone_a: int, zone_b: int, kind_a: int, kind_b: int) -> int:
    if zone_a == zone_b == 1:
        return EDGE_TYPES.index("passage")
    return EDGE_TYPES.index("entrance" if 5 in (kind_a, kind_b) else "door")
