"""A picture from Flux.1 dev, which has no unconditional pass: c + s (c - k), the second pass from the skipped block on.

Needs a GPU with 32 GB or more: with offloading the largest part that is on it at a time is the transformer (12B
weights, 24 GB in bfloat16). They are behind a licence on the hub: accept it there, then `hf auth login`. Run:

    python flux.py "a tram in the rain" -o tram.png
    python flux.py --tiny
"""

import argparse
from pathlib import Path

import torch
from diffusers import FluxPipeline

from skipguide.pipelines import SpatiotemporalSkipGuidance

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt", nargs="?", default="a tram in the rain")
parser.add_argument("-o", "--out", default="flux.png")
parser.add_argument("--tiny", action="store_true", help="random weights on the CPU; needs tiny.py beside this file")
args = parser.parse_args()
if Path(args.out).exists():
    parser.error(f"{args.out} is there already: name another file with --out")
if args.tiny:
    from tiny import FluxPipeline
elif not torch.accelerator.is_available():
    parser.error("expected a GPU and found none: --tiny shows on the CPU what the script does, with random weights")

pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16)
pipe.enable_model_cpu_offload()
pipe.transformer.compile_repeated_blocks()
# No source gives layers for Flux. Its 19 blocks with two streams come first, then 38 with one; two thirds of the
# way through is a place to start, not measured. `skipguide rank black-forest-labs/FLUX.1-dev` scores every block.
with SpatiotemporalSkipGuidance(layers=[38], scale=1.0).apply(pipe) as applied:
    image = pipe(
        args.prompt,
        guidance_scale=3.5,
        width=1024,
        height=1024,
        num_inference_steps=28,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
image.save(args.out)
print(applied.stats, f"wrote {args.out}", sep="\n")
