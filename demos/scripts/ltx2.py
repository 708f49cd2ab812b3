"""A clip with sound from LTX-2, with the pipeline's own guidance in fewer passes: `PrefixReuse` changes no result.

Needs a GPU with 48 GB or more: with offloading the largest part that is on it at a time is the transformer (19B
weights, 38 GB in bfloat16); the rest waits in 65 GB of main memory. Also `pip install -e ".[video]"`. The sound is a
.wav beside the clip: with `pip install av`, `diffusers.utils.encode_video` writes both into one file. Run:

    python -m demos.scripts.ltx2 "a tram in the rain" -o tram.mp4
    python -m demos.scripts.ltx2 --tiny
"""

import torch
from diffusers import LTX2Pipeline
from diffusers.utils import export_to_video

from demos.scripts import tiny
from demos.scripts.common import options, save_sound
from skipguide.pipelines import PrefixReuse


def main(argv: list[str] | None = None) -> None:
    args = options(__doc__, "ltx2.mp4", argv, beside=".wav")
    if args.tiny:
        pipe, call = tiny.ltx2()
    else:
        pipe = LTX2Pipeline.from_pretrained("Lightricks/LTX-2", torch_dtype=torch.bfloat16)
        pipe.enable_model_cpu_offload()
        pipe.vae.enable_tiling()
        call = {"width": 768, "height": 512, "num_frames": 121, "num_inference_steps": 30}
    # The pipeline's own four passes a step: CFG, STG in block 29 (28 for LTX-2.3), and each modality without the other.
    # Its STG pass changes nothing where pipe.transformer.config.perturbed_attn is False: stg_scale=0.0 saves it there.
    call |= {"stg_scale": 1.0, "spatio_temporal_guidance_blocks": [29], "output_type": "np", "return_dict": False}
    with PrefixReuse().apply(pipe) as applied:
        video, sound = pipe(args.prompt, frame_rate=24.0, generator=torch.Generator().manual_seed(args.seed), **call)
    export_to_video(list(video[0]), str(args.out), fps=24)
    save_sound(sound[0], args.out.with_suffix(".wav"), pipe.vocoder.config.output_sampling_rate)
    print(applied.stats, f"wrote {args.out} and its sound", sep="\n")


if __name__ == "__main__":
    main()
