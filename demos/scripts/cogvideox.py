"""A clip from CogVideoX 2B, guided with its own block 11 left out.

Needs a GPU with 12 GB or more: with offloading the largest part that is on it at a time is the T5 text encoder (9.5 GB
in float16), and the autoencoder goes tile by tile. Also `pip install "imageio[ffmpeg]"`. Run:

    python cogvideox.py "a tram in the rain" -o tram.mp4
    python cogvideox.py --tiny
"""

import argparse
from pathlib import Path

import torch
from diffusers import CogVideoXPipeline
from diffusers.utils import export_to_video

from skipguide.pipelines import SpatiotemporalSkipGuidance

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt", nargs="?", default="a tram in the rain")
parser.add_argument("-o", "--out", default="cogvideox.mp4")
parser.add_argument("--tiny", action="store_true", help="random weights on the CPU; needs tiny.py beside this file")
args = parser.parse_args()
if Path(args.out).exists():
    parser.error(f"{args.out} is there already: name another file with --out")
if args.tiny:
    from tiny import CogVideoXPipeline
elif not torch.accelerator.is_available():
    parser.error("expected a GPU and found none: --tiny shows on the CPU what the script does, with random weights")

pipe = CogVideoXPipeline.from_pretrained("THUDM/CogVideoX-2b", torch_dtype=torch.float16)
pipe.enable_model_cpu_offload()
pipe.vae.enable_slicing()
pipe.vae.enable_tiling()
# Block 11 of 30 at scale 1 is the preset of the method's authors; layers=None would take it, too.
with SpatiotemporalSkipGuidance(layers=[11], scale=1.0).apply(pipe) as applied:
    video = pipe(
        args.prompt,
        guidance_scale=6.0,
        width=720,
        height=480,
        num_frames=49,
        num_inference_steps=50,
        generator=torch.Generator().manual_seed(0),
    ).frames[0]
export_to_video(video, args.out, fps=8)
print(applied.stats, f"wrote {args.out}", sep="\n")
