"""Skip guidance on Stable Video Diffusion and AnimateDiff: spatial and temporal skips with scales of their own.

The reference answers every branch with the formula's result, so that any CFG of the pipeline's own arrives at it.
"""

import pytest
import torch

from skipguide import Prefix, SkipError, Skipper, SkipPlan, capture, find_blocks, resume
from skipguide.guidance import rescale
from skipguide.pipelines import SkipGroup
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.pipes_unet import (
    BY_UNET,
    BY_UNET_PIPE,
    STEPS,
    animatediff_pipe,
    animatediff_xl_pipe,
    run_animatediff,
    run_animatediff_xl,
)

STACKS = ("spatial", "temporal")
both = pytest.mark.parametrize("name", ["svd", "animatediff"])


def stacks_of(family):
    """The stack of every block, by what its name says."""
    return ["temporal" if "temporal" in name or "motion" in name else "spatial" for name in family.block_names]


def layer_of(family, stack, number):
    return [i for i, each in enumerate(stacks_of(family)) if each == stack][number]


class Reference:
    """y = u + w (c - u) + sum of s (c - k), in float64, in place of the denoiser's forward."""

    def __init__(self, pipe, family, w, terms, cfg=True, amount=0.0):
        self.model, self.cfg, self.w, self.amount = pipe.unet, cfg, w, amount
        self.weak = [(edit(family, pipe.unet), s) for edit, s in terms]
        self.plain = pipe.unet.forward
        pipe.unet.forward = self

    def __call__(self, *args, **kwargs):
        out = self.plain(*args, **kwargs)
        first = out[0].double()
        u, c = first.chunk(2) if self.cfg else (first, first)
        y = u + self.w * (c - u)
        for model, s in self.weak:
            k = model(*args, **kwargs)[0].double()
            y = y + s * (c - (k.chunk(2)[1] if self.cfg else k))
        if self.amount:
            y = rescale(y, c, self.amount)
        y = (torch.cat([y, y]) if self.cfg else y).to(out[0].dtype)
        return (y,) if isinstance(out, tuple) else type(out)(sample=y)


def frame_scales(name):
    """SVD's CFG scale by frame, [1, F, 1, 1, 1]; AnimateDiff's one scale."""
    return torch.linspace(1.0, 3.0, 3)[None, :, None, None, None].double() if name == "svd" else 5.0


def check(name, stg, terms, clips=1, cfg=True, amount=0.0, **call):
    case = BY_UNET_PIPE[name]
    pipe, run, family = case.make(), case.run, BY_UNET[case.family]
    plain = run(pipe, clips, cfg, **call)
    with stg.apply(pipe) as applied:
        out = run(pipe, clips, cfg, **call)
    assert torch.equal(run(pipe, clips, cfg, **call), plain)
    assert (out - plain).norm() > 0.01 * plain.norm()
    Reference(pipe, family, frame_scales(name), terms, cfg, amount)
    expected = run(pipe, clips, cfg, **call)
    torch.testing.assert_close(out, expected, atol=2e-5 * expected.abs().max().item(), rtol=0)
    return applied.stats


def without(stack, number, part="block"):
    def edit(family, model):
        layer = layer_of(family, stack, number)
        return family.identity_block(model, layer) if part == "block" else family.zeroed(model, layer, part)

    return edit


@both
@pytest.mark.parametrize("clips", [1, 2])
def test_spatial_and_temporal_skips_with_a_scale_each(name, clips):
    groups = (SkipGroup([2], 2.0, stack="spatial"), SkipGroup([2], 0.5, stack="temporal"))
    stats = check(name, Stg(groups=groups), [(without("spatial", 2), 2.0), (without("temporal", 2), 0.5)], clips)
    family = BY_UNET[name]
    n, layers = len(family.block_names), [layer_of(family, stack, 2) for stack in STACKS]
    assert stats.delivery == "shift" and stats.passes == 3 * STEPS
    assert stats.blocks_run == STEPS * (2 * n + sum(n - 1 - layer for layer in layers))


@both
@pytest.mark.parametrize("stack", STACKS)
def test_without_cfg(name, stack):
    stats = check(name, Stg([1], stack=stack), [(without(stack, 1), 1.0)], cfg=False)
    assert stats.passes == 2 * STEPS


@both
def test_a_batched_tail(name):
    """The rows that share a beginning are taken out of what folds frames or positions into the batch, too."""
    groups = (SkipGroup([2], 2.0, stack="spatial"), SkipGroup([1], 0.5, "attn", "temporal"))
    terms = [(without("spatial", 2), 2.0), (without("temporal", 1, "attn"), 0.5)]
    stats = check(name, Stg(groups=groups, tail="batched"), terms, clips=2)
    assert stats.passes == STEPS


@both
def test_sublayers(name):
    groups = (SkipGroup([3], 1.0, "mlp", "temporal"), SkipGroup([0], 1.5, "attn", "spatial"))
    check(name, Stg(groups=groups), [(without("temporal", 3, "mlp"), 1.0), (without("spatial", 0, "attn"), 1.5)])


@both
def test_rescale(name):
    """SVD's scale is 1 at the first frame, where the unconditional branch has no weight: both branches are set."""
    stats = check(name, Stg([1], rescale=0.7, stack="spatial"), [(without("spatial", 1), 1.0)], amount=0.7)
    assert stats.delivery == "solve"


@both
def test_attention_identity_of_one_stack(name):
    """As in the authors' code for Stable Video Diffusion, where it is the only form."""
    family = BY_UNET[name]

    def values(family, model):
        inputs = family.inputs(1)
        return family.value_identity(model, layer_of(family, "temporal", 1), inputs)

    assert "attn_identity" in find_blocks(family.build())[1].parts
    stg = Stg(groups=(SkipGroup([1], 1.5, "attn_identity", "temporal"),))
    check(name, stg, [(values, 1.5)])


@both
def test_the_uncond_formula_and_intervals(name):
    """One weak unconditional pass, and steps whose unconditional pass is left out."""
    pipe, run = BY_UNET_PIPE[name].make(), BY_UNET_PIPE[name].run
    plain = run(pipe)
    for stg in (Stg([1], formula="uncond", stack="spatial"), Stg([1], cfg_interval=(0.3, 1.0), stack="temporal")):
        with stg.apply(pipe) as applied:
            out = run(pipe)
        assert (out - plain).norm() > 0.01 * plain.norm() and applied.stats.blocks_run < applied.stats.blocks_naive
    assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize("name", ["animatediff_video", "animatediff_xl"])
def test_other_animatediff_pipelines(name):
    groups = (SkipGroup([1], 1.0, stack="spatial"), SkipGroup([4], 0.5, stack="temporal"))
    check(name, Stg(groups=groups), [(without("spatial", 1), 1.0), (without("temporal", 4), 0.5)], clips=2)


def test_the_rescale_of_animatediff_xl():
    """The pipeline's own, with ours inside it: c is as it was, so that both have the deviation they ask for."""
    w, amount = 5.0, 0.6
    pipe = animatediff_xl_pipe()
    with Stg([1], stack="spatial").apply(pipe) as applied:
        out = run_animatediff_xl(pipe, guidance_rescale=amount)
    assert applied.stats.delivery == "solve"
    weak, plain = without("spatial", 1)(BY_UNET["animatediff"], pipe.unet), pipe.unet.forward

    def forward(*args, **kwargs):
        u, c = plain(*args, **kwargs)[0].double().chunk(2)
        k = weak(*args, **kwargs)[0].double().chunk(2)[1]
        y = u + w * (c - u) + (c - k)
        return (torch.cat([(y - w * c) / (1 - w), c]).float(),)

    pipe.unet.forward = forward
    torch.testing.assert_close(out, run_animatediff_xl(pipe, guidance_rescale=amount), atol=2e-4, rtol=0)


def test_animatediff_free_init():
    """It goes through the steps again from the result of the last time, with the start as a window."""
    pipe = animatediff_pipe()
    pipe.enable_free_init(num_iters=2)
    with Stg([1], stack="temporal", start=0.5).apply(pipe) as applied:
        run_animatediff(pipe)
    assert applied.stats.passes == 2 * (STEPS + 1)


@both
def test_a_pass_resumes_behind_long_connections(name):
    """What the blocks of the way down returned reaches the way up again, bit for bit, and they do not run."""
    family = BY_UNET[name]
    model, inputs = family.build(), family.inputs(2)
    last = len(family.block_names) - 1
    prefix = Prefix(last)
    with capture(model, prefix):
        plain = family.run(model, inputs)
    assert {"down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0"} < set(prefix.kept)
    assert not [name for name in prefix.kept if name.startswith("down_blocks.0.")], "what is inside is not kept"
    with Skipper(model, SkipPlan([last]), resume=prefix) as skipper:
        out = family.run(model, inputs)
    assert torch.equal(out, family.run(family.identity_block(model, last), inputs)) and not skipper.stats.calls
    with resume(model, prefix):
        assert torch.equal(family.run(model, inputs), plain)


@both
def test_stacks_in_execution_order(name):
    family = BY_UNET[name]
    blocks = find_blocks(family.build())
    assert [block.stack for block in blocks] == stacks_of(family)
    with pytest.raises(SkipError, match="its stacks are spatial, temporal"):
        blocks.select([0], stack="transformer_blocks")


def test_animatediff_without_motion_modules_in_the_middle():
    """Older motion modules have none there; the stack is what is left."""
    import diffusers

    config = dict(BY_UNET["animatediff"].make().config) | {"use_motion_mid_block": False}
    blocks = find_blocks(diffusers.UNetMotionModel.from_config(config))
    assert not [block.name for block in blocks if "mid_block.motion" in block.name]
    assert len(blocks) == len(BY_UNET["animatediff"].block_names) - 1
