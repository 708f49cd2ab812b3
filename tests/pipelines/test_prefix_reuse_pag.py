"""PrefixReuse on the pipelines with perturbed attention: the third part of their batch shares its beginning."""

import dataclasses

import diffusers
import pytest
import torch
from helpers.native_calls import compared, near

from skipguide import find_blocks
from skipguide.errors import UnknownBlockError
from skipguide.pipelines import PrefixReuse
from zoo.pipes import BY_PIPE, SD3_TEXT, STEPS
from zoo.pipes_image import FLUX_TEXT, IMAGE_PIPES, around, ddim, image_vae, shifted
from zoo.pipes_unet import animatediff_pipe, run_animatediff

IMAGES = {case.name: case for case in IMAGE_PIPES}
HUNYUAN = ("safety_checker", "feature_extractor")


def perturbed(case, make, layer):
    return dataclasses.replace(case, make=make), layer


# the pipelines, each with one of its own examples' ways to name a layer, deep in the tiny model
PAG = {
    "sd3": perturbed(BY_PIPE["sd3"], around("StableDiffusion3PAGPipeline", "sd3", shifted, *SD3_TEXT), "blocks.2"),
    "sd35": perturbed(BY_PIPE["sd35"], around("StableDiffusion3PAGPipeline", "sd35", shifted, *SD3_TEXT), "blocks.2"),
    "sd3_img2img": perturbed(
        IMAGES["sd3_img2img"],
        around("StableDiffusion3PAGImg2ImgPipeline", "sd3", shifted, *SD3_TEXT, vae=image_vae),
        "blocks.2",
    ),
    "sana": perturbed(IMAGES["sana"], around("SanaPAGPipeline", "sana", shifted), "transformer_blocks.2"),
    "pixart_sigma": perturbed(IMAGES["pixart_sigma"], around("PixArtSigmaPAGPipeline", "pixart", ddim), "blocks.2"),
    "hunyuan_dit": perturbed(
        IMAGES["hunyuan_dit"],
        around("HunyuanDiTPAGPipeline", "hunyuan_dit", ddim, *FLUX_TEXT, *HUNYUAN, requires_safety_checker=False),
        "blocks.2",
    ),
}


def built(name, layer=None):
    case, own = PAG[name]
    pipe = case.build()
    pipe.set_pag_applied_layers(own if layer is None else layer, pipe._pag_attn_processors)
    return case, pipe, len(find_blocks(pipe.transformer))


@pytest.mark.parametrize("name", PAG)
@pytest.mark.parametrize("clips", [1, 2])
def test_the_perturbed_rows_share_their_beginning(name, clips):
    case, pipe, blocks = built(name)
    plain, out, stats = compared(case, pipe, num_prompts=clips, pag_scale=2.0)
    near(out, plain)
    assert not torch.allclose(case.run(pipe, num_prompts=clips, pag_scale=0.0), plain, rtol=1e-3, atol=1e-3)
    assert stats.passes == STEPS and stats.reused == {"perturbed attention": STEPS} and not stats.not_reused
    assert stats.blocks_plain == STEPS * clips * 3 * blocks
    assert stats.blocks_run == STEPS * clips * (3 * blocks - 2)


@pytest.mark.parametrize("name", ["sd3", "sana", "pixart_sigma"])
def test_without_cfg_there_are_two_parts(name):
    case, pipe, blocks = built(name)
    plain, out, stats = compared(case, pipe, cfg=False, pag_scale=2.0)
    near(out, plain)
    assert stats.blocks_run == STEPS * (2 * blocks - 2)


def test_rows_that_nobody_can_assign_are_left_alone():
    """HunyuanDiT's pipeline passes three sizes and styles with a batch of two where there is no CFG."""
    case, pipe, _ = built("hunyuan_dit")
    plain, out, stats = compared(case, pipe, cfg=False, pag_scale=2.0)
    assert torch.equal(out, plain)
    (why,) = stats.not_reused
    assert "image_meta_size" in why and stats.blocks_run == stats.blocks_plain


@pytest.mark.parametrize(("layer", "saved"), [("blocks.0", 0), ("blocks.1", 1), (["blocks.3", "blocks.1"], 1)], ids=str)
def test_the_first_perturbed_block_counts_and_the_first_of_all_saves_nothing(layer, saved):
    case, pipe, blocks = built("sd3", layer)
    plain, out, stats = compared(case, pipe, pag_scale=2.0)
    near(out, plain)
    assert stats.blocks_run == STEPS * (3 * blocks - saved)
    whole = {"perturbed attention whole: it differs from the first block on": STEPS}
    assert stats.not_reused == ({} if saved else whole)


def test_with_perturbed_attention_off_nothing_is_shared():
    case, pipe, blocks = built("sd3")
    plain, out, stats = compared(case, pipe, pag_scale=0.0)
    assert torch.equal(out, plain)
    assert stats.blocks_run == STEPS * 2 * blocks and not stats.reused


def test_rows_of_another_text_run_whole():
    """A callback gives the perturbed part a text of its own from the second step on."""
    case, pipe, blocks = built("sd3")

    def change(pipe, step, timestep, given):
        text = given["prompt_embeds"].clone()
        text[2] += 1
        return {"prompt_embeds": text}

    call = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    plain, out, stats = compared(case, pipe, pag_scale=2.0, **call)
    near(out, plain)
    assert stats.reused == {"perturbed attention": 1}
    assert stats.not_reused == {"perturbed attention whole: its rows have inputs of their own": STEPS - 1}
    assert stats.blocks_run == STEPS * 3 * blocks - 2


@pytest.mark.parametrize("layer", ["mid_block.*attn1", "up_blocks.1.*attn1"])
def test_a_unet_with_motion_modules(layer):
    pipe = animatediff_pipe(cls=diffusers.AnimateDiffPAGPipeline, pag_applied_layers=layer)
    blocks = find_blocks(pipe.unet)
    perturbed = [block.index for block in blocks if block.name.startswith(layer.partition(".*")[0])]
    plain = run_animatediff(pipe, pag_scale=2.0)
    with PrefixReuse().apply(pipe) as applied:
        out = run_animatediff(pipe, pag_scale=2.0)
    near(out, plain)
    assert applied.stats.blocks_run == STEPS * (3 * len(blocks) - min(perturbed))


def test_a_unet_whose_blocks_are_not_described_says_so():
    class Pipe:
        unet = diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8,),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
        )

    with pytest.raises(UnknownBlockError, match="UNet2DModel"):
        PrefixReuse().apply(Pipe())
