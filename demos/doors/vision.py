"""The door to vision: the nuclei that a UNet++ finds at a shallow head and at its deepest one."""

from __future__ import annotations

import torch
from PIL import Image

from demos.doors.panels import Panel, row
from skipguide.assets import bundled
from skipguide.media.frames import as_images
from skipguide.vision import UNetPlusPlus
from skipguide.vision.segmentation import MaskMeter, overlay
from skipguide.vision.unetpp.nuclei import generate_nuclei

SEED = 7  # that of `skipguide segment`
HEADS = (1, 2, 4)


@torch.no_grad()
def draw() -> Image.Image:
    """The same picture at three heads."""
    model = UNetPlusPlus.from_pretrained(bundled("tiny-unetpp")).eval()
    nuclei, inside = generate_nuclei(SEED)
    picture = as_images(nuclei[None])[0]
    panels = []
    for head in HEADS:
        run = model.run(nuclei[None], head)
        mask = run.logits[0, 0] > 0
        meter = MaskMeter(1)
        meter.update(run.logits, inside[None])
        share = sum(run.rows_run.values()) / len(model.nodes())
        words = f"head {head}: overlap {100 * meter.pooled_iou:.0f} %"
        panels.append(Panel(overlay(picture, mask, (255, 140, 0)), words, share, f"{share:.0%} of the network"))
    return row(panels, "How deep must a UNet++ run? You choose.")
