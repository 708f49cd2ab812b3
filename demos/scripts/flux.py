"""A picture from Flux.1 dev, which has no unconditional pass: c + s (c - k), the second pass from the skipped block on.

Needs a GPU with 32 GB or more: with offloading the largest part that is on it at a time is the transformer (12B
weights, 24 GB in bfloat16). They are behind a licence on the hub: accept it there, then `hf auth login`. Run:

    python -m demos.scripts.flux "a tram in the rain" -o tram.png
    python -m demos.scripts.flux --tiny
"""

import torch
from diffusers import FluxPipeline

from demos.scripts import tiny
from demos.scripts.common import options
from skipguide.pipelines import SpatiotemporalSkipGuidance


def main(argv: list[str] | None = None) -> None:
    args = options(__doc__, "flux.png", argv)
    if args.tiny:
        pipe, call = tiny.flux()
    else:
        pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16)
        pipe.enable_model_cpu_offload()
        pipe.transformer.compile_repeated_blocks()
        call = {"width": 1024, "height": 1024, "num_inference_steps": 28}
    # No source gives layers for Flux. Its 19 blocks with two streams come first, then 38 with one; two thirds of the
    # way through is a place to start, not measured. `skipguide rank black-forest-labs/FLUX.1-dev` scores every block.
    with SpatiotemporalSkipGuidance(layers=[38], scale=1.0).apply(pipe) as applied:
        generator = torch.Generator().manual_seed(args.seed)
        image = pipe(args.prompt, guidance_scale=3.5, generator=generator, **call).images[0]
    image.save(args.out)
    print(applied.stats, f"wrote {args.out}", sep="\n")


if __name__ == "__main__":
    main()
