"""A picture from Qwen-Image with skip guidance on top of CFG, its blocks compiled.

Needs a GPU with 48 GB or more: with offloading the largest part that is on it at a time is the transformer (20B
weights, 41 GB in bfloat16); the text encoder (about 17 GB) waits in main memory. Run:

    python qwen_image.py "a tram in the rain" -o tram.png
    python qwen_image.py --tiny
"""

import argparse
from pathlib import Path

import torch
from diffusers import QwenImagePipeline

from skipguide.pipelines import SpatiotemporalSkipGuidance

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt", nargs="?", default="a tram in the rain")
parser.add_argument("-o", "--out", default="qwen_image.png")
parser.add_argument("--tiny", action="store_true", help="random weights on the CPU; needs tiny.py beside this file")
args = parser.parse_args()
if Path(args.out).exists():
    parser.error(f"{args.out} is there already: name another file with --out")
if args.tiny:
    from tiny import QwenImagePipeline
elif not torch.accelerator.is_available():
    parser.error("expected a GPU and found none: --tiny shows on the CPU what the script does, with random weights")

pipe = QwenImagePipeline.from_pretrained("Qwen/Qwen-Image", torch_dtype=torch.bfloat16)
pipe.enable_model_cpu_offload()
pipe.transformer.compile_repeated_blocks()
# No source gives layers for Qwen-Image: two thirds of the way through its 60 blocks is a place to start, not
# measured. `skipguide rank Qwen/Qwen-Image` scores every block.
with SpatiotemporalSkipGuidance(layers=[40], scale=1.0).apply(pipe) as applied:
    image = pipe(
        args.prompt,
        negative_prompt=" ",  # without a negative prompt this pipeline does no CFG
        true_cfg_scale=4.0,
        width=1328,
        height=1328,
        num_inference_steps=50,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
image.save(args.out)
print(applied.stats, f"wrote {args.out}", sep="\n")
