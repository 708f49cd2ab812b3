"""A clip with sound from LTX-2, with the pipeline's own guidance in fewer passes: `PrefixReuse` changes no result.

Needs a GPU with 48 GB or more: with offloading the largest part that is on it at a time is the transformer (19B
weights, 38 GB in bfloat16); the rest waits in 65 GB of main memory. Also `pip install "imageio[ffmpeg]" scipy`. The
sound is a .wav beside the clip: with `pip install av`, `diffusers.utils.encode_video` writes both into one file. Run:

    python ltx2.py "a tram in the rain" -o tram.mp4
    python ltx2.py --tiny
"""

import argparse
from pathlib import Path

import torch
from diffusers import LTX2Pipeline
from diffusers.utils import export_to_video
from scipy.io import wavfile

from skipguide.pipelines import PrefixReuse

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt", nargs="?", default="a tram in the rain")
parser.add_argument("-o", "--out", default="ltx2.mp4")
parser.add_argument("--tiny", action="store_true", help="random weights on the CPU; needs tiny.py beside this file")
args = parser.parse_args()
if Path(args.out).exists():
    parser.error(f"{args.out} is there already: name another file with --out")
if args.tiny:
    from tiny import LTX2Pipeline
elif not torch.accelerator.is_available():
    parser.error("expected a GPU and found none: --tiny shows on the CPU what the script does, with random weights")

pipe = LTX2Pipeline.from_pretrained("Lightricks/LTX-2", torch_dtype=torch.bfloat16)
pipe.enable_model_cpu_offload()
pipe.vae.enable_tiling()
# The pipeline's own four passes a step: CFG, STG in block 29 (28 for LTX-2.3), and each modality without the other.
# Its STG pass changes nothing where pipe.transformer.config.perturbed_attn is False: stg_scale=0.0 saves it there.
with PrefixReuse().apply(pipe) as applied:
    videos, sounds = pipe(
        args.prompt,
        stg_scale=1.0,
        spatio_temporal_guidance_blocks=[29],
        width=768,
        height=512,
        num_frames=121,
        frame_rate=24.0,
        num_inference_steps=30,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        return_dict=False,
    )
export_to_video(list(videos[0]), args.out, fps=24)
sound = sounds[0].float().cpu().numpy().T
wavfile.write(Path(args.out).with_suffix(".wav"), pipe.vocoder.config.output_sampling_rate, sound)
print(applied.stats, f"wrote {args.out} and its sound", sep="\n")
