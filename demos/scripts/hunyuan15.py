"""A clip from HunyuanVideo 1.5, whose guidance is a component of the pipeline: `SkipGuider` takes its place.

Needs a GPU with 24 GB or more: with offloading the largest parts that are on it at a time are the transformer and the
text encoder (about 17 GB each in bfloat16). Also `pip install "imageio[ffmpeg]"`. Run:

    python hunyuan15.py "a tram in the rain" -o tram.mp4
    python hunyuan15.py --tiny
"""

import argparse
from pathlib import Path

import torch
from diffusers import HunyuanVideo15Pipeline
from diffusers.utils import export_to_video

from skipguide.pipelines import SkipGuider

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt", nargs="?", default="a tram in the rain")
parser.add_argument("-o", "--out", default="hunyuan15.mp4")
parser.add_argument("--tiny", action="store_true", help="random weights on the CPU; needs tiny.py beside this file")
args = parser.parse_args()
if Path(args.out).exists():
    parser.error(f"{args.out} is there already: name another file with --out")
if args.tiny:
    from tiny import HunyuanVideo15Pipeline
elif not torch.accelerator.is_available():
    parser.error("expected a GPU and found none: --tiny shows on the CPU what the script does, with random weights")

hub = "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v"
pipe = HunyuanVideo15Pipeline.from_pretrained(hub, torch_dtype=torch.bfloat16)
pipe.enable_model_cpu_offload()
pipe.vae.enable_tiling()
# No source gives layers for this model: two thirds of the way through its 54 blocks is a place to start, not
# measured. `skipguide rank hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v` scores every block.
SkipGuider(layers=[36], scale=1.0, guidance_scale=6.0).attach(pipe)
video = pipe(
    args.prompt,
    width=832,
    height=480,
    num_frames=121,
    num_inference_steps=50,
    generator=torch.Generator().manual_seed(0),
).frames[0]
export_to_video(video, args.out, fps=24)
print(pipe.guider.stats, f"wrote {args.out}", sep="\n")
