"""A picture from Stable Diffusion 3.5 medium, whose own skip guidance `PrefixReuse` makes cheaper: the same result.

Needs a GPU with 12 GB or more: with offloading the largest part that is on it at a time is the T5 text encoder (9.5 GB
in bfloat16). The weights are behind a licence on the hub: accept it there, then `hf auth login`. Run:

    python sd35.py "a tram in the rain" -o tram.png
    python sd35.py --tiny
"""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

from skipguide.pipelines import PrefixReuse

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt", nargs="?", default="a tram in the rain")
parser.add_argument("-o", "--out", default="sd35.png")
parser.add_argument("--tiny", action="store_true", help="random weights on the CPU; needs tiny.py beside this file")
args = parser.parse_args()
if Path(args.out).exists():
    parser.error(f"{args.out} is there already: name another file with --out")
if args.tiny:
    from tiny import StableDiffusion3Pipeline
elif not torch.accelerator.is_available():
    parser.error("expected a GPU and found none: --tiny shows on the CPU what the script does, with random weights")

hub = "stabilityai/stable-diffusion-3.5-medium"
pipe = StableDiffusion3Pipeline.from_pretrained(hub, torch_dtype=torch.bfloat16)
pipe.enable_model_cpu_offload()
# For other formulas, parts or windows: SpatiotemporalSkipGuidance, without skip_guidance_layers in the call.
with PrefixReuse().apply(pipe) as applied:
    image = pipe(
        args.prompt,
        guidance_scale=4.5,
        skip_guidance_layers=[7, 8, 9],  # from 0.01 to 0.2 of the steps, at scale 2.8, as its makers advise
        width=1024,
        height=1024,
        num_inference_steps=40,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
image.save(args.out)
print(applied.stats, f"wrote {args.out}", sep="\n")
