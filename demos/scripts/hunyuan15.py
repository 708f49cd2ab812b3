"""A clip from HunyuanVideo 1.5, whose guidance is a component of the pipeline: `SkipGuider` takes its place.

Needs a GPU with 24 GB or more: with offloading the largest parts that are on it at a time are the transformer and the
text encoder (about 17 GB each in bfloat16). Also `pip install -e ".[video]"`. Run:

    python -m demos.scripts.hunyuan15 "a tram in the rain" -o tram.mp4
    python -m demos.scripts.hunyuan15 --tiny
"""

import torch
from diffusers import HunyuanVideo15Pipeline
from diffusers.utils import export_to_video

from demos.scripts import tiny
from demos.scripts.common import options
from skipguide.pipelines import SkipGuider

HUB = "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v"


def main(argv: list[str] | None = None) -> None:
    args = options(__doc__, "hunyuan15.mp4", argv)
    if args.tiny:
        pipe, call = tiny.hunyuan15()
    else:
        pipe = HunyuanVideo15Pipeline.from_pretrained(HUB, torch_dtype=torch.bfloat16)
        pipe.enable_model_cpu_offload()
        pipe.vae.enable_tiling()
        call = {"width": 832, "height": 480, "num_frames": 121, "num_inference_steps": 50}
    # No source gives layers for this model: two thirds of the way through its 54 blocks is a place to start, not
    # measured. `skipguide rank hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v` scores every block.
    SkipGuider(layers=[36], scale=1.0, guidance_scale=6.0).attach(pipe)
    video = pipe(args.prompt, generator=torch.Generator().manual_seed(args.seed), **call).frames[0]
    export_to_video(video, str(args.out), fps=24)
    print(pipe.guider.stats, f"wrote {args.out}", sep="\n")


if __name__ == "__main__":
    main()
