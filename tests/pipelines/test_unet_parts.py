"""What guidance on a UNet does beside skipping a block: parts, formulas, perturbed attention, only the suffix."""

import dataclasses

import diffusers
import pytest
import torch
from helpers.unet_reference import BY_CASE, LAYER, by_hand, close, guided, run, weak

from skipguide import Prefix, SkipError, Skipper, SkipPlan, UnknownBlockError, capture, check, find_blocks, resume
from skipguide.pipelines import PrefixReuse, SkipGroup
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from skipguide.schedule import Timetable
from zoo import BY_NAME
from zoo.pipes import PipeCase
from zoo.pipes_unet_picture import CHECKER, around, sd, sdxl, text_call, xl_vae

SD, SDXL = BY_CASE["sd"], BY_CASE["sdxl"]
both = pytest.mark.parametrize("case", [SD, SDXL], ids=repr)
LAYERS = {"sd": ("mid", "up_blocks.1.attentions.0"), "sdxl": ("mid", "up_blocks.0")}


# -- perturbed attention: as diffusers' own pipelines ------------------------------------------------------------------


def pag(case, layers):
    """The pipeline that was forked for perturbed attention, with the same weights."""
    cls, unet, more = (
        ("StableDiffusionPAGPipeline", sd, CHECKER)
        if case is SD
        else ("StableDiffusionXLPAGPipeline", sdxl, {"add_watermarker": False, "vae": xl_vae} | XL)
    )
    made = around(cls, unet, **more, pag_applied_layers=list(layers))
    return PipeCase(f"{case.name}_pag", case.family, made, text_call(pooled=case is SDXL), case.cfg_modes)


XL = dict.fromkeys(("text_encoder_2", "tokenizer_2"))


@both
@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "alone"])
def test_attention_identity_equals_the_perturbed_attention_pipeline(case, cfg):
    fork, scale = pag(case, LAYERS[case.name]), 3.0
    theirs = run(fork, fork.build(), cfg=cfg, pag_scale=scale)
    layers = find_blocks(case.build().unet).named(*LAYERS[case.name])
    ours, stats = guided(case, Stg(layers, scale=scale, part="attn_identity"), cfg=cfg)
    assert len(layers) > 1 and stats.passes == 6
    close(ours, theirs)
    assert not torch.allclose(theirs, run(fork, fork.build(), cfg=cfg, pag_scale=0.0), atol=1e-2)


@both
def test_names_stand_for_the_layers_that_their_pipeline_perturbs(case):
    for name in (*LAYERS[case.name], "down_blocks", "up_blocks.(0|1)", "attentions.1"):
        fork = pag(case, [name]).build()
        fork._set_pag_attn_processor(fork.pag_applied_layers, True)
        theirs = [path.removesuffix(".attn1.processor") for path in fork.pag_attn_processors]
        blocks = find_blocks(fork.unet)
        assert {blocks[layer].name for layer in blocks.named(name)} == set(theirs)


def test_a_name_that_stands_for_no_block():
    blocks = find_blocks(SD.build().unet)
    assert blocks.named("mid", "mid_block", "down") == (0, 1)
    with pytest.raises(SkipError, match=r"no block named 'up_blocks.7'; its blocks are down_blocks.0"):
        blocks.named("mid", "up_blocks.7")
    with pytest.raises(SkipError, match="regular expression"):
        blocks.named("mid(")


@both
@pytest.mark.parametrize("clips", [1, 2])
def test_the_forks_guidance_is_cheaper_with_prefix_reuse(case, clips):
    fork = pag(case, LAYERS[case.name])
    pipe = fork.build()
    plain = run(fork, pipe, clips, pag_scale=3.0)
    first, n = find_blocks(pipe.unet).named(*LAYERS[case.name])[0], len(find_blocks(pipe.unet))
    with PrefixReuse().apply(pipe) as applied:
        out = run(fork, pipe, clips, pag_scale=3.0)
    close(out, plain)
    assert applied.stats.blocks_run == 3 * clips * (3 * n - first) and not applied.stats.not_reused


# -- parts and formulas ------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("part", ["attn", "cross_attn", "mlp", "attn_identity"])
def test_parts(case, part):
    out, _ = guided(case, Stg([LAYER], scale=1.5, part=part))
    close(out, by_hand(case, part))


@both
def test_without_cfg(case):
    out, stats = guided(case, Stg([LAYER], scale=1.5), cfg=False)
    close(out, by_hand(case, cfg=False, w=1.0))
    assert stats.passes == 6


@both
def test_rescale(case):
    out, stats = guided(case, Stg([LAYER], scale=1.5, rescale=0.7))
    close(out, by_hand(case, amount=0.7))
    assert stats.delivery == "solve"


@both
def test_the_pipelines_own_rescale(case):
    """Ours lies inside it: c is as it was, so that both have the deviation they ask for."""
    w, amount, pipe = 7.5, 0.6, case.build()
    out, stats = guided(case, Stg([LAYER]), call={"guidance_rescale": amount})
    assert stats.delivery == "solve"
    other, plain = weak(case, pipe.unet), pipe.unet.forward

    def forward(*args, **kwargs):
        u, c = plain(*args, **kwargs)[0].double().chunk(2)
        k = other(*args, **kwargs)[0].double().chunk(2)[1]
        y = u + w * (c - u) + (c - k)
        return (torch.cat([(y - w * c) / (1 - w), c]).float(),)

    pipe.unet.forward = forward
    close(out, run(case, pipe, guidance_rescale=amount))


@both
def test_whole_passes_and_a_batched_tail_give_the_same(case):
    groups = (SkipGroup([3], 1.0), SkipGroup([1], 0.5, "attn"))
    out, stats = guided(case, Stg(groups=groups))
    whole, all_blocks = guided(case, Stg(groups=groups, prefix_reuse=False))
    batched, one = guided(case, Stg(groups=groups, tail="batched"))
    close(out, whole)
    close(batched, whole)
    assert stats.blocks_run < all_blocks.blocks_run and one.passes == 3


@both
def test_the_uncond_formula_and_intervals(case):
    for stg in (Stg([1], formula="uncond"), Stg([1], cfg_interval=(0.3, 1.0))):
        _, stats = guided(case, stg)
        assert stats.blocks_run < stats.blocks_naive


def test_attention_to_the_text_alone_has_no_map():
    """The upscaler's blocks on the way down have no self-attention."""
    blocks = find_blocks(BY_CASE["sd_upscale"].build().unet)
    assert "attn_identity" not in blocks[0].parts and "attn_identity" in blocks[1].parts
    with pytest.raises(SkipError, match="to the text alone"):
        blocks.select([0], "attn_identity")


def test_one_attention_over_picture_and_text_is_skipped_whole():
    blocks = find_blocks(BY_CASE["kandinsky22"].build().unet)
    assert blocks[1].parts == ("block",)
    with pytest.raises(SkipError, match="has no attn"):
        blocks.select([1], "attn_identity")


def test_steps_of_a_part_of_the_schedule():
    """A window of the steps is one of those that the call makes: it makes three of five."""
    for name in ("sd_img2img", "sdxl_img2img", "kandinsky21_img2img", "if_img2img"):
        _, stats = guided(BY_CASE[name], Stg([1], start=0.5))
        assert stats.passes == 3 + 1, name


def test_steps_that_are_left_to_a_refiner():
    """The noise level of a step is that of its own timestep, not of the last ones."""
    pipe = SDXL.build()
    pipe.scheduler.set_timesteps(10)
    kept = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps[5]]
    early = Timetable([(1000.0, 1.0), (float(((1 - kept) / kept).sqrt()), 0.0)], over="sigma")
    with Stg([1], scale=early).apply(pipe) as applied:
        run(SDXL, pipe, num_inference_steps=10, denoising_end=0.5)
    assert applied.stats.passes == 5 + 5


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' Euler and Heun under numpy 2
@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_schedulers_that_the_released_models_have(name):
    """PNDM and Heun call the denoiser more often than there are steps; Euler scales its input."""
    config = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    made = getattr(diffusers, name)(beta_schedule="scaled_linear", steps_offset=1, **config)
    case = dataclasses.replace(SD, make=lambda seed: with_scheduler(SD.make(seed), made))
    out, stats = guided(case, Stg([LAYER], scale=1.5))
    close(out, by_hand(case))
    assert stats.passes == 2 * {"PNDMScheduler": 4, "HeunDiscreteScheduler": 5}.get(name, 3)


def with_scheduler(pipe, made):
    pipe.scheduler = type(made).from_config(made.config)
    return pipe


@pytest.mark.parametrize("name", ["sd_upscale", "sd_unclip", "kandinsky21", "kandinsky22_control", "if", "if_super"])
def test_the_self_test_makes_inputs_of_every_kind(name):
    assert check(BY_CASE[name].build().unet).blocks == 4


# -- only the suffix runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "sdxl", "kandinsky2", "svd", "animatediff"])
def test_a_pass_that_resumes_runs_no_convolutions_before_it(name):
    """Neither the way down nor what lies before the block on the way up; the result is the same, bit for bit."""
    family = BY_NAME[name]
    model, inputs = family.build(), family.inputs(2)
    convolutions = {path: m for path, m in model.named_modules() if "resnets" in path and path.endswith("conv1")}
    ran = []
    for path, module in convolutions.items():
        module.register_forward_hook(lambda *_, path=path: ran.append(path))
    plain = family.run(model, inputs)
    order, ran[:] = list(ran), []
    assert set(order) == set(convolutions)
    for layer, block in enumerate(find_blocks(model)):
        prefix = Prefix(layer)
        with capture(model, prefix):
            family.run(model, inputs)
        ran.clear()
        with resume(model, prefix):
            assert torch.equal(family.run(model, inputs), plain)
        place = block.name.replace("attentions", "resnets").replace("motion_modules", "resnets")
        own = ".".join(place.split(".")[: 3 if place.startswith("mid") else 4]) + "."
        last = max(number for number, path in enumerate(order) if path.startswith(own))
        assert ran == order[last + 1 :], block.name
        with Skipper(model, SkipPlan([layer]), resume=prefix):
            assert torch.equal(family.run(model, inputs), family.run(family.identity_block(model, layer), inputs))


def test_a_stack_that_an_instance_lacks():
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=2, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        mid_block_type=None,
    )  # fmt: skip
    with pytest.raises(UnknownBlockError, match="of which this instance has none"):
        find_blocks(model)
