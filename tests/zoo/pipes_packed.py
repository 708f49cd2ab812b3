"""Tiny stock pipelines of the transformers whose text and pictures share a sequence."""

import diffusers
import torch

from zoo.family import TEXT, prefix_mask, rows
from zoo.image_calls import MASK, picture, qwen_call, text_call
from zoo.image_joint import klein
from zoo.image_packed import ideogram4_places
from zoo.pipes import BATCHED, SINGLE, TWO_CALLS, PipeCase, embeds, flow
from zoo.pipes_image import around, dynamic, flux2_vae


class Processor:
    """What Qwen-Image 2.1 asks of its processor when it is made."""

    @property
    def tokenizer(self):
        return self

    def apply_chat_template(self, *args, **kwargs):
        return [[0, 1, 2]]

    def encode(self, text):
        return [7]


def qwen21(seed: int):
    made = {"vae": None, "text_encoder": None, "processor": Processor()}
    return diffusers.QwenImage21Pipeline(scheduler=flow(), transformer=model("qwen21", seed), **made)


def model(family: str, seed: int):
    from zoo.pipes import MODELS

    return MODELS[family].build(seed)


def qwen21_call(num_prompts: int, cfg: bool):
    return {**qwen_call(num_prompts, cfg), "height": 128, "width": 128}


def fibo2(seed: int):
    made = {"vae": None, "text_encoder": None, "processor": None}
    return diffusers.BriaFibo2Pipeline(model("fibo2", seed), dynamic(), **made)


def fibo2_call(num_prompts: int, cfg: bool):
    out: dict[str, object] = {}
    for seed, prefix in ((1, ""), (2, "negative_"))[: 1 + cfg]:
        out[f"{prefix}prompt_embeds"] = rows(num_prompts, seed, 3, TEXT, 24)
        out[f"{prefix}prompt_embeds_mask"] = prefix_mask(num_prompts, TEXT).bool()
    return {**out, "height": 64, "width": 64, "guidance_scale": 5.0 if cfg else 1.0}


def nucleus(seed: int):
    made = {"vae": None, "text_encoder": None, "processor": None}
    return diffusers.NucleusMoEImagePipeline(model("nucleus", seed), flow(), **made)


def nucleus_call(num_prompts: int, cfg: bool):
    text = embeds(num_prompts, cfg, mask="prompt_embeds_mask")
    return {**text, "height": 64, "width": 64, "guidance_scale": 4.0 if cfg else 1.0}


def klein_kv_call(num_prompts: int, cfg: bool):
    """With a picture, whose keys and values are kept from the first step."""
    return {"prompt_embeds": rows(num_prompts, 1, TEXT, 24), "height": 64, "width": 64, "image": picture()}


def ideogram4(seed: int):
    """A model with text and one without, whose weights differ."""
    models = {"transformer": model("ideogram4", seed), "unconditional_transformer": model("ideogram4", seed + 50)}
    pipe = diffusers.Ideogram4Pipeline(flow(), vae=None, text_encoder=None, tokenizer=None, **models)

    def encode(prompt, grid_h, **_):
        text = torch.nn.functional.pad(rows(len(prompt), 1, TEXT, 24), (0, 0, 0, grid_h * grid_h))
        return text, *ideogram4_places(len(prompt), grid_h)

    pipe.encode_prompt = encode
    return pipe


def ideogram4_call(num_prompts: int, cfg: bool):
    """A scale for each step."""
    call = {"prompt": ["a", "b"][:num_prompts], "height": 64, "width": 64, "max_sequence_length": TEXT}
    return {**call, "guidance_schedule": [7.0, 5.0, 3.0]}


PACKED_PIPES = (
    PipeCase("ideogram4", "ideogram4", ideogram4, ideogram4_call, SINGLE),
    PipeCase(
        "lumina_next",
        "lumina_next",
        around("LuminaPipeline", "lumina_next"),
        text_call(64, 4.0, mask=MASK, clean_caption=False),
        BATCHED,
    ),
    PipeCase("fibo2", "fibo2", fibo2, fibo2_call, TWO_CALLS),
    PipeCase("qwen21", "qwen21", qwen21, qwen21_call, TWO_CALLS),
    PipeCase("nucleus", "nucleus", nucleus, nucleus_call, TWO_CALLS),
    PipeCase(
        "klein_kv",
        "flux2",
        around("Flux2KleinKVPipeline", "flux2", model=klein, vae=flux2_vae),
        klein_kv_call,
        SINGLE,
    ),
)
