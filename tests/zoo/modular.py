"""Tiny modular pipelines of diffusers around the zoo's models, from prompt embeddings to latents."""

import torch
from diffusers.modular_pipelines.ltx import modular_blocks_ltx
from diffusers.modular_pipelines.ltx2 import modular_blocks_ltx2
from diffusers.modular_pipelines.wan import modular_blocks_wan, modular_blocks_wan22
from torch import Tensor

from zoo.family import TEXT, prefix_mask, rows
from zoo.pipes import BY_PIPE, STEPS, embeds, placed
from zoo.pipes_video import BY_VIDEO

BLOCKS = {
    "ltx": modular_blocks_ltx.LTXCoreDenoiseStep,
    "wan": modular_blocks_wan.WanCoreDenoiseStep,
    "wan22": modular_blocks_wan22.Wan22CoreDenoiseStep,
}


def latents(num_prompts: int) -> Tensor:
    """What the denoising starts from; the classic pipelines take it under the same name."""
    return rows(num_prompts, 5, 4, 2, 6, 6)


def build(name: str, seed: int = 0, **components):
    """The modular counterpart of the zoo's classic pipeline of that name, with the same weights."""
    classic = BY_PIPE[name].build(seed)
    pipe = BLOCKS[name]().init_pipeline()
    denoisers = {key: value for key in ("transformer", "transformer_2") if (value := getattr(classic, key, None))}
    pipe.update_components(**{**denoisers, "scheduler": classic.scheduler, **components})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, num_prompts: int = 1, **overrides) -> Tensor:
    """The negative prompt is a required input of these blocks, with CFG or without."""
    call = {"num_inference_steps": STEPS, "height": 48, "width": 48, "num_frames": 5, "latents": latents(num_prompts)}
    return pipe(**placed({**embeds(num_prompts, True), **call, **overrides}, pipe), output="latents")


def build_ltx2(seed: int = 0, **components):
    """Modular LTX-2, whose two guiders make its STG and modality passes, each in a call of its own."""
    classic = BY_VIDEO["ltx2_own"].build(seed)
    pipe = modular_blocks_ltx2.LTX2CoreDenoiseStep().init_pipeline()
    names = ("transformer", "scheduler", "audio_vae")
    pipe.update_components(**{name: getattr(classic, name) for name in names}, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_ltx2(pipe, clips: int = 1, noise: int = 3) -> Tensor:
    """Video and sound, from what the connectors give."""
    text: dict[str, object] = {}
    for seed, prefix in ((1, ""), (2, "negative_")):
        video = rows(clips, seed, TEXT, 24)
        made = {"prompt_embeds": video, "audio_prompt_embeds": video + 0.5, "attention_mask": prefix_mask(clips, TEXT)}
        text |= {f"{prefix}connector_{name}": value for name, value in made.items()}
    sizes = {"height": 96, "width": 96, "num_frames": 9, "frame_rate": 24.0, "num_inference_steps": STEPS}
    call = {"batch_size": clips, "dtype": torch.float32, "generator": torch.Generator().manual_seed(noise)}
    out = pipe(**text, **sizes, **call, output=["latents", "audio_latents"])
    return torch.cat([each.flatten(1) for each in out.values()], dim=1)


def ltx_inputs(num_prompts: int = 1) -> dict[str, object]:
    """What LTX's blocks want beyond Wan's: masks of the text, and the sizes of the classic case."""
    masks = {f"{prefix}prompt_attention_mask": prefix_mask(num_prompts, TEXT) for prefix in ("", "negative_")}
    return {**masks, "height": 96, "width": 96, "num_frames": 9}
