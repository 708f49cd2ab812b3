"""A clip from LTX-Video (2B), guided with its own block 19 left out.

Needs a GPU with 12 GB or more: with offloading the largest part that is on it at a time is the T5 text encoder (9.5 GB
in bfloat16), and activations come on top. Also `pip install -e ".[video]"` for the mp4. Run:

    python -m demos.scripts.ltx "a tram in the rain" -o tram.mp4
    python -m demos.scripts.ltx --tiny
"""

import torch
from diffusers import LTXPipeline
from diffusers.utils import export_to_video

from demos.scripts import tiny
from demos.scripts.common import options
from skipguide.pipelines import SpatiotemporalSkipGuidance


def main(argv: list[str] | None = None) -> None:
    args = options(__doc__, "ltx.mp4", argv)
    if args.tiny:
        pipe, call = tiny.ltx()
    else:
        pipe = LTXPipeline.from_pretrained("Lightricks/LTX-Video", torch_dtype=torch.bfloat16)
        pipe.enable_model_cpu_offload()
        pipe.transformer.compile_repeated_blocks()
        call = {"width": 704, "height": 480, "num_frames": 121, "num_inference_steps": 50}
    call |= {"negative_prompt": "worst quality, inconsistent motion, blurry, jittery, distorted"}
    # Block 19 of 28 at scale 1 is the preset of the method's authors; layers=None would take it, too.
    with SpatiotemporalSkipGuidance(layers=[19], scale=1.0).apply(pipe) as applied:
        video = pipe(args.prompt, generator=torch.Generator().manual_seed(args.seed), **call).frames[0]
    export_to_video(video, str(args.out), fps=24)
    print(applied.stats, f"wrote {args.out}", sep="\n")


if __name__ == "__main__":
    main()
