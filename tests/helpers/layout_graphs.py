"""Two layout graphs: three rooms in a ring, and a pair."""

from skipguide.vision.floorplan import LayoutGraph

TRIANGLE = LayoutGraph([0, 1, 2], [[0, 1, 2], [1, 2, 0]], [0, 1, 2])
PAIR = LayoutGraph([3, 1], [[0], [1]])
