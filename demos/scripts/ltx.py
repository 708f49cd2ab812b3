"""A clip from LTX-Video (2B), guided with its own block 19 left out.

Needs a GPU with 12 GB or more: with offloading the largest part that is on it at a time is the T5 text encoder (9.5 GB
in bfloat16), and activations come on top. Also `pip install "imageio[ffmpeg]"` for the mp4. Run:

    python ltx.py "a tram in the rain" -o tram.mp4
    python ltx.py --tiny
"""

import argparse
from pathlib import Path

import torch
from diffusers import LTXPipeline
from diffusers.utils import export_to_video

from skipguide.pipelines import SpatiotemporalSkipGuidance

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt", nargs="?", default="a tram in the rain")
parser.add_argument("-o", "--out", default="ltx.mp4")
parser.add_argument("--tiny", action="store_true", help="random weights on the CPU; needs tiny.py beside this file")
args = parser.parse_args()
if Path(args.out).exists():
    parser.error(f"{args.out} is there already: name another file with --out")
if args.tiny:
    from tiny import LTXPipeline
elif not torch.accelerator.is_available():
    parser.error("expected a GPU and found none: --tiny shows on the CPU what the script does, with random weights")

pipe = LTXPipeline.from_pretrained("Lightricks/LTX-Video", torch_dtype=torch.bfloat16)
pipe.enable_model_cpu_offload()
pipe.transformer.compile_repeated_blocks()
# Block 19 of 28 at scale 1 is the preset of the method's authors; layers=None would take it, too.
with SpatiotemporalSkipGuidance(layers=[19], scale=1.0).apply(pipe) as applied:
    video = pipe(
        args.prompt,
        negative_prompt="worst quality, inconsistent motion, blurry, jittery, distorted",
        width=704,
        height=480,
        num_frames=121,
        num_inference_steps=50,
        generator=torch.Generator().manual_seed(0),
    ).frames[0]
export_to_video(video, args.out, fps=24)
print(applied.stats, f"wrote {args.out}", sep="\n")
