"""SkipGuider in further pipelines with a guider, against the model with a block taken out, delivered by a shift."""

import diffusers
import pytest
import torch
from helpers.residue import traces
from helpers.stg_reference import close

from skipguide.pipelines import SkipGuider
from zoo import BY_NAME, modular, randomise
from zoo.family import TEXT, prefix_mask, rows
from zoo.pipes import STEPS, embeds, size

LAYER, W, S = 1, 4.0, 1.5


def hunyuan_image(guider):
    pipe = diffusers.HunyuanImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=4.0),
        transformer=BY_NAME["hunyuan_image"].build(),
        guider=guider,
        **dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )

    def call():
        text = {}
        for seed, prefix in ((1, ""), (2, "negative_")):
            text[f"{prefix}prompt_embeds"] = rows(2, seed, TEXT, 24)
            text[f"{prefix}prompt_embeds_mask"] = prefix_mask(2, TEXT)
            text[f"{prefix}prompt_embeds_2"] = rows(2, seed + 10, 4, 12)
            text[f"{prefix}prompt_embeds_mask_2"] = prefix_mask(2, 4)
        return pipe(**text, **size(128), **common())[0]

    return pipe, call


def motif(guider):
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    family = BY_NAME["motif"]
    config = dict(family.make().config) | {"in_channels": 9}  # the condition and its mask beside the latents
    transformer = type(family.make()).from_config(config)
    pipe = diffusers.MotifVideoPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=randomise(transformer, 3),
        guider=guider,
    )

    def call():
        return pipe(**embeds(2, True, mask="prompt_attention_mask"), **size(48, 5), **common())[0]

    return pipe, call


def ltx_modular(guider):
    pipe = modular.build("ltx", guider=guider)

    def call():
        text = embeds(2, True, mask="prompt_attention_mask")
        start = rows(2, 5, 2 * 3 * 3, 8)
        return pipe(**text, **size(96, 9), num_inference_steps=STEPS, latents=start, output="latents")

    return pipe, call


def common():
    generator = torch.Generator().manual_seed(11)
    return {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False, "generator": generator}


CASES = {
    "hunyuan_image": (hunyuan_image, "hunyuan_image"),
    "motif": (motif, "motif"),
    "ltx_modular": (ltx_modular, "ltx"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("w", [W, 1.0])
def test_against_the_block_taken_out(name, w):
    make, family = CASES[name]
    pipe, call = make(diffusers.ClassifierFreeGuidance(guidance_scale=w))
    pipe.set_progress_bar_config(disable=True)
    plain = call()
    model = pipe.transformer
    weak, run, delta = BY_NAME[family].identity_block(model, LAYER), model.forward, []

    def shifted(*args, **kwargs):
        """The same delta on both calls of a step, the conditional one first."""
        out = run(*args, **kwargs)
        d = delta.pop() if delta else S * (out[0] - weak(*args, **kwargs)[0])
        delta.extend([d] if w != 1 and not shifted.second else [])
        shifted.second = not shifted.second
        return (out[0] + d, *out[1:])

    shifted.second = False
    model.forward = shifted
    expected = call()
    del model.forward
    guider = SkipGuider([LAYER], scale=S, guidance_scale=w)
    if hasattr(pipe, "update_components") and name.endswith("modular"):
        pipe.update_components(guider=guider)
    else:
        pipe.guider = guider
    before = traces(model)
    out = call()
    assert traces(model) == before
    assert (out - plain).norm() > 0.01 * plain.norm()
    close(out, expected)
    blocks = len(BY_NAME[family].block_names)
    branches = 1 + (w != 1)
    assert guider.stats.passes == STEPS * (branches + 1)
    assert guider.stats.blocks_run == STEPS * (branches * blocks + blocks - 1 - LAYER)
