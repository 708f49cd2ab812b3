"""Pictures of layout graphs: rooms as discs in a circle, connections as lines."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from skipguide.media.sheets import INK, PAPER
from skipguide.vision.floorplan.graph import EDGE_TYPES, LayoutGraph

if TYPE_CHECKING:
    from PIL.Image import Image

ZONE_NAMES = ("sleeping", "living", "service", "outdoor")
ZONE_COLOURS = ((140, 180, 222), (245, 203, 120), (160, 132, 168), (162, 205, 130))
EDGE_COLOURS = ((90, 90, 96), (220, 38, 38), (22, 163, 74))
UNKNOWN = (170, 170, 170)


def draw_graph(graph: LayoutGraph, size: int = 384) -> Image:
    """A layout graph as a picture with a legend of its zones and connections; it does not show where rooms lie.

    Args:
        graph: the rooms.
        size: width in pixels, at least 200; the legend stands below.

    Example:
        >>> draw_graph(LayoutGraph([0, 1, 1], [[0, 1], [1, 2]]), size=240).width
        240
    """
    from PIL import Image, ImageDraw, ImageFont

    size = max(size, 200)
    zones = sorted(set(graph.zones.tolist()))
    assert graph.edge_types is not None
    types = sorted(set(graph.edge_types.tolist()))
    lines = [f"{_zone_name(zone)} zone" for zone in zones]
    step, font = 20, ImageFont.load_default(13)
    canvas = Image.new("RGB", (size, size + step * max(len(zones), len(types)) + 8), PAPER)
    draw = ImageDraw.Draw(canvas)
    disc = max(10, min(26, round(3.2 * size / (len(graph) + 12))))
    places = []
    for room in range(len(graph)):
        turn = 2 * math.pi * room / len(graph) - math.pi / 2
        reach = 0 if len(graph) == 1 else size / 2 - disc - 8
        places.append((size / 2 + reach * math.cos(turn), size / 2 + reach * math.sin(turn)))
    for (one, other), kind in zip(graph.edges.T.tolist(), graph.edge_types.tolist(), strict=True):
        draw.line((*places[one], *places[other]), fill=_colour_at(EDGE_COLOURS, kind), width=3)
    for (x, y), zone in zip(places, graph.zones.tolist(), strict=True):
        draw.ellipse(
            (x - disc, y - disc, x + disc, y + disc), fill=_colour_at(ZONE_COLOURS, zone), outline=INK, width=2
        )
    for at, (zone, line) in enumerate(zip(zones, lines, strict=True)):
        y = size + 4 + step * at
        draw.ellipse((4, y, 18, y + 14), fill=_colour_at(ZONE_COLOURS, zone), outline=INK)
        draw.text((24, y + 7), line, fill=INK, font=font, anchor="lm")
    for at, kind in enumerate(types):
        y = size + 11 + step * at
        draw.line((size // 2, y, size // 2 + 24, y), fill=_colour_at(EDGE_COLOURS, kind), width=3)
        name = EDGE_TYPES[kind] if kind < len(EDGE_TYPES) else f"connection {kind}"
        draw.text((size // 2 + 30, y), name, fill=INK, font=font, anchor="lm")
    return canvas


def _zone_name(zone: int) -> str:
    return ZONE_NAMES[zone] if zone < len(ZONE_NAMES) else f"{zone}th"


def _colour_at(colours: tuple[tuple[int, int, int], ...], at: int) -> tuple[int, int, int]:
    return colours[at] if at < len(colours) else UNKNOWN
