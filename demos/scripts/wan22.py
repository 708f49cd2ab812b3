"""A clip from Wan 2.2 A14B, whose two denoisers (for high and for low noise) are both guided, each with its own layers.

Needs a GPU with 24 GB: group offloading keeps the weights (two denoisers of 28 GB and a text encoder of 11 GB, in
bfloat16) in 80 GB of main memory and brings them layer by layer. Also `pip install -e ".[video]"`. Run:

    python -m demos.scripts.wan22 "a tram in the rain" -o tram.mp4
    python -m demos.scripts.wan22 --tiny
"""

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.utils import export_to_video

from demos.scripts import tiny
from demos.scripts.common import options
from skipguide.pipelines import SpatiotemporalSkipGuidance

HUB = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
# No source gives layers for Wan 2.2: two thirds of the way through the 40 blocks is a place to start, not measured.
# `skipguide rank Wan-AI/Wan2.2-T2V-A14B-Diffusers` scores every block of the first denoiser,
# `skipguide.pipelines.calibrate(pipe, denoiser="transformer_2")` those of the second.
LAYERS = {"transformer": [27], "transformer_2": [27]}


def main(argv: list[str] | None = None) -> None:
    args = options(__doc__, "wan22.mp4", argv)
    if args.tiny:
        pipe, call = tiny.wan22()
    else:
        vae = AutoencoderKLWan.from_pretrained(HUB, subfolder="vae", torch_dtype=torch.float32)
        pipe = WanPipeline.from_pretrained(HUB, vae=vae, torch_dtype=torch.bfloat16)
        pipe.enable_group_offload(onload_device=torch.device("cuda"), offload_type="leaf_level", use_stream=True)
        call = {"width": 832, "height": 480, "num_frames": 81, "num_inference_steps": 40}
    call |= {"guidance_scale": 4.0, "guidance_scale_2": 3.0, "negative_prompt": "static, blurred, overexposed"}
    with SpatiotemporalSkipGuidance(LAYERS, scale=1.0).apply(pipe) as applied:
        video = pipe(args.prompt, generator=torch.Generator().manual_seed(args.seed), **call).frames[0]
    export_to_video(video, str(args.out), fps=16)
    print(applied.stats, f"wrote {args.out}", sep="\n")


if __name__ == "__main__":
    main()
