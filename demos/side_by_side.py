"""The clip in pipelines/README.md: same prompts, same seeds, without and with skip guidance.

The prompts are the first ones of the list below and the seed is 0: nothing is picked.

    python -m demos.side_by_side --out demos/media/side_by_side.gif
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from skipguide.assets import bundled
from skipguide.media import pictures
from skipguide.pipelines import SpatiotemporalSkipGuidance, bundled_pipeline, find_preset

PROMPTS = (
    "a large red circle moving right on a black background",
    "a small blue square moving up on stripes",
    "a large green triangle circling on a checkerboard",
    "a big yellow star growing on a grey gradient",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demos/media/side_by_side.gif"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--zoom", type=int, default=2)
    args = parser.parse_args()

    pipe, call = bundled_pipeline()
    fps = json.loads((bundled() / "generation.json").read_text()).get("fps", 8)

    def clips() -> list[list[pictures.Image]]:
        generators = [torch.Generator().manual_seed(args.seed) for _ in PROMPTS]
        made = pipe(list(PROMPTS), generator=generators, output_type="pt", **call).frames
        images = [pictures.as_images(clip) for clip in made]
        return [pictures.resized(frames, args.zoom * frames[0].height) for frames in images]

    plain = clips()
    preset = find_preset(pipe.transformer)
    with SpatiotemporalSkipGuidance(preset.layers, preset.scale, preset.part).apply(pipe) as applied:
        guided = clips()
    print(applied.stats)
    panels = [
        pictures.side_by_side(pair, ["plain", "skip guidance"], prompt)
        for prompt, *pair in zip(PROMPTS, plain, guided, strict=True)
    ]
    frames = [
        pictures.stacked([pictures.in_a_row(row) for row in (panel[:2], panel[2:])])
        for panel in zip(*panels, strict=True)
    ]
    partial = args.out.with_name(f".{args.out.name}.partial.gif")
    pictures.save_gif(frames, partial, fps=fps)
    partial.replace(args.out)


if __name__ == "__main__":
    main()
