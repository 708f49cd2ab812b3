"""Tiny modular pipelines of diffusers around the zoo's models, from prompt embeddings to latents."""

from diffusers.modular_pipelines.ltx import modular_blocks_ltx
from diffusers.modular_pipelines.wan import modular_blocks_wan, modular_blocks_wan22
from torch import Tensor

from zoo.family import rows
from zoo.pipes import BY_PIPE, STEPS, embeds, placed

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
    return pipe(**placed({**embeds(num_prompts, True), **call}, pipe), **overrides, output="latents")
