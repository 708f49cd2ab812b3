"""Skip guidance on pipelines with a ControlNet and on those that edit a picture, against a reference by hand."""

import pytest
import torch
from helpers.image_reference import reference
from helpers.residue import no_gates
from helpers.stg_reference import LAYER, close

from skipguide import find_blocks
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.pipes_control import BY_CONTROL, CONTROL_PIPES
from zoo.pipes_edits import EDIT_PIPES

pytestmark = pytest.mark.numerics
CASES = (*CONTROL_PIPES, *EDIT_PIPES)
W = {
    "flux_controlnet": 4.0, "sd3_controlnet": 7.0, "sd3_controlnet_inpaint": 7.0, "qwen_controlnet": 4.0,
    "qwen_controlnet_inpaint": 4.0, "hunyuan_dit_controlnet": 5.0, "sana_controlnet": 4.5, "cogview4_control": 5.0,
    "qwen_edit": 4.0, "qwen_edit_plus": 4.0, "qwen_edit_inpaint": 4.0, "qwen_layered": 4.0, "longcat_edit": 4.5,
    "fibo": 5.0, "fibo_edit": 5.0,
}  # fmt: skip
ONE_PROMPT = {"qwen_edit_plus", "qwen_layered", "longcat_edit"}  # those that take no more
# the pipeline brings the result to the norm of c, so that only `solve` is exact
RENORM = {"qwen_controlnet", "qwen_controlnet_inpaint", "qwen_edit", "qwen_edit_plus", "qwen_edit_inpaint"}


def run(case, pipe, *args, **call):
    torch.manual_seed(0)  # SD3's encodes the control picture by chance, with no generator
    return case.run(pipe, *args, **call)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_guided_pipeline_equals_the_reference(case):
    """Also when layers before the one that is skipped get something from the ControlNet, and that one itself."""
    prompts = 1 if case.name in ONE_PROMPT else 2
    pipe = case.build()
    plain, cfg = run(case, pipe, prompts), case.name in W
    with Stg([LAYER], scale=1.5).apply(pipe) as applied:
        out = run(case, pipe, prompts)
    assert torch.equal(run(case, pipe, prompts), plain)
    no_gates(pipe.transformer)
    by_hand = reference(pipe, case, W.get(case.name), cfg, s=1.5)
    if case.family == "sd3":  # the model asks its blocks before it adds what is from the ControlNet
        by_hand.model_without.transformer_blocks[LAYER].context_pre_only = False
    close(out, run(case, pipe, prompts))
    assert not torch.allclose(out, plain, atol=1e-4), "the guidance did nothing"
    n, branches = len(find_blocks(case.build().transformer)), 2 if cfg else 1
    assert applied.stats.delivery == ("solve" if case.name in RENORM else "shift")
    assert applied.stats.blocks_run == 3 * (branches * n + n - 1 - LAYER)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in W], ids=repr)
def test_without_cfg(case):
    pipe = case.build()
    with Stg([LAYER]).apply(pipe) as applied:
        out = run(case, pipe, 1, False)
    by_hand = reference(pipe, case, None, False)
    if case.family == "sd3":
        by_hand.model_without.transformer_blocks[LAYER].context_pre_only = False
    close(out, run(case, pipe, 1, False))
    assert applied.stats.passes == 6


NETS = ["flux_controlnet", "sd3_controlnet", "qwen_controlnet", "hunyuan_dit_controlnet", "sana_controlnet"]


@pytest.mark.parametrize("name", NETS)
def test_what_a_controlnet_adds_is_used(name):
    case = BY_CONTROL[name]
    pipe = case.build()
    with Stg([LAYER]).apply(pipe):
        guided = run(case, pipe)
        without = run(case, pipe, controlnet_conditioning_scale=0.0)
    assert not torch.allclose(guided, without, atol=1e-3)


def test_what_a_controlnet_adds_behind_the_skipped_block_stays():
    """It belongs to the branch that asked for it: a skipped pass leaves a block out, not what is added after it."""
    case = BY_CONTROL["sana_controlnet"]  # adds what it gives in front of the second block, and of the third
    pipe = case.build()
    with Stg([LAYER]).apply(pipe):
        out = run(case, pipe)
    by_hand = reference(pipe, case, W[case.name])

    def weak_without(*args, weak=by_hand.weak, **kwargs):
        given = kwargs["controlnet_block_samples"]
        return weak(*args, **kwargs | {"controlnet_block_samples": (given[0], torch.zeros_like(given[1]))})

    stays = run(case, pipe)
    by_hand.calls, by_hand.weak = 0, weak_without
    close(out, stays)
    assert not torch.allclose(out, run(case, pipe), atol=1e-3)
