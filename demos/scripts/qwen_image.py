"""A picture from Qwen-Image with skip guidance on top of CFG, its blocks compiled.

Needs a GPU with 48 GB or more: with offloading the largest part that is on it at a time is the transformer (20B
weights, 41 GB in bfloat16); the text encoder (about 17 GB) waits in main memory. Run:

    python -m demos.scripts.qwen_image "a tram in the rain" -o tram.png
    python -m demos.scripts.qwen_image --tiny
"""

import torch
from diffusers import QwenImagePipeline

from demos.scripts import tiny
from demos.scripts.common import options
from skipguide.pipelines import SpatiotemporalSkipGuidance


def main(argv: list[str] | None = None) -> None:
    args = options(__doc__, "qwen_image.png", argv)
    if args.tiny:
        pipe, call = tiny.qwen_image()
    else:
        pipe = QwenImagePipeline.from_pretrained("Qwen/Qwen-Image", torch_dtype=torch.bfloat16)
        pipe.enable_model_cpu_offload()
        pipe.transformer.compile_repeated_blocks()
        call = {"width": 1328, "height": 1328, "num_inference_steps": 50}
    call |= {"negative_prompt": " ", "true_cfg_scale": 4.0}  # without a negative prompt this pipeline does no CFG
    # No source gives layers for Qwen-Image: two thirds of the way through its 60 blocks is a place to start, not
    # measured. `skipguide rank Qwen/Qwen-Image` scores every block.
    with SpatiotemporalSkipGuidance(layers=[40], scale=1.0).apply(pipe) as applied:
        image = pipe(args.prompt, generator=torch.Generator().manual_seed(args.seed), **call).images[0]
    image.save(args.out)
    print(applied.stats, f"wrote {args.out}", sep="\n")


if __name__ == "__main__":
    main()
