"""Floor plans from a structure image and a layout graph, on the grid that UNet++ uses.

After "Skip-Connected Neural Networks with Layout Graphs for Floor Plan Auto-Generation" (arXiv 2309.13881).

Example:
    >>> import torch
    >>> from skipguide.vision.floorplan import FloorPlanNet, collate, generate_plan
    >>> images, graphs, targets = collate([generate_plan(seed) for seed in (0, 1)])
    >>> net = FloorPlanNet(widths=(8, 12, 16)).eval()
    >>> net(images, graphs).shape
    torch.Size([2, 11, 32, 32])
"""

from skipguide.vision.floorplan.draw import draw_plan
from skipguide.vision.floorplan.draw_graph import draw_graph
from skipguide.vision.floorplan.generate import generate_plan
from skipguide.vision.floorplan.graph import GraphBatch, GraphConv, LayoutGraph
from skipguide.vision.floorplan.msd import MSDFolder, preprocess, save_submission, submission_image, write_plan
from skipguide.vision.floorplan.net import FloorPlanNet
from skipguide.vision.floorplan.plan import BACKGROUND, CLASSES, IGNORE, STRUCTURE, ZONES, Plan, collate

__all__ = [
    "BACKGROUND",
    "CLASSES",
    "IGNORE",
    "STRUCTURE",
    "ZONES",
    "FloorPlanNet",
    "GraphBatch",
    "GraphConv",
    "LayoutGraph",
    "MSDFolder",
    "Plan",
    "collate",
    "draw_graph",
    "draw_plan",
    "generate_plan",
    "preprocess",
    "save_submission",
    "submission_image",
    "write_plan",
]
