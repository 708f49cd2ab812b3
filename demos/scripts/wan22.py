"""A clip from Wan 2.2 A14B, whose two denoisers (for high and for low noise) are both guided, each with its own layers.

Needs a GPU with 24 GB: group offloading keeps the weights (two denoisers of 28 GB and a text encoder of 11 GB, in
bfloat16) in 80 GB of main memory and brings them layer by layer. Also `pip install "imageio[ffmpeg]"`. Run:

    python wan22.py "a tram in the rain" -o tram.mp4
    python wan22.py --tiny
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.utils import export_to_video

from skipguide.pipelines import SpatiotemporalSkipGuidance

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt", nargs="?", default="a tram in the rain")
parser.add_argument("-o", "--out", default="wan22.mp4")
parser.add_argument("--tiny", action="store_true", help="random weights on the CPU; needs tiny.py beside this file")
args = parser.parse_args()
if Path(args.out).exists():
    parser.error(f"{args.out} is there already: name another file with --out")
if args.tiny:
    from tiny import AutoencoderKLWan, WanPipeline
elif not torch.accelerator.is_available():
    parser.error("expected a GPU and found none: --tiny shows on the CPU what the script does, with random weights")

hub = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
vae = AutoencoderKLWan.from_pretrained(hub, subfolder="vae", torch_dtype=torch.float32)
pipe = WanPipeline.from_pretrained(hub, vae=vae, torch_dtype=torch.bfloat16)
pipe.enable_group_offload(onload_device=torch.device("cuda"), offload_type="leaf_level", use_stream=True)
# No source gives layers for Wan 2.2: two thirds of the way through the 40 blocks is a place to start, not measured.
# `skipguide rank Wan-AI/Wan2.2-T2V-A14B-Diffusers` scores every block of the first denoiser,
# `skipguide.pipelines.calibrate(pipe, denoiser="transformer_2")` those of the second.
layers = {"transformer": [27], "transformer_2": [27]}
with SpatiotemporalSkipGuidance(layers, scale=1.0).apply(pipe) as applied:
    video = pipe(
        args.prompt,
        negative_prompt="static, blurred, overexposed",
        guidance_scale=4.0,
        guidance_scale_2=3.0,
        width=832,
        height=480,
        num_frames=81,
        num_inference_steps=40,
        generator=torch.Generator().manual_seed(0),
    ).frames[0]
export_to_video(video, args.out, fps=16)
print(applied.stats, f"wrote {args.out}", sep="\n")
