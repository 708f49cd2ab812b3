"""Skip guidance on pipelines with a ControlNet and on those that edit a picture, against a reference by hand."""

import pytest
import torch
from helpers.residue import no_gates
from helpers.stg_reference import LAYER, Reference, close

from skipguide import find_blocks
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.pipes_control import BY_CONTROL, CONTROL_PIPES

pytestmark = pytest.mark.numerics
W = {"flux_controlnet": 4.0, "sd3_controlnet": 7.0, "sd3_controlnet_inpaint": 7.0}
W |= dict.fromkeys(("qwen_edit", "qwen_edit_plus"), 4.0)


def run(case, pipe, *args, **call):
    torch.manual_seed(0)  # SD3's encodes the control picture by chance, with no generator
    return case.run(pipe, *args, **call)


@pytest.mark.parametrize("case", CONTROL_PIPES, ids=repr)
def test_guided_pipeline_equals_the_reference(case):
    """Also when layers before the one that is skipped get something from the ControlNet."""
    prompts = 1 if "edit" in case.name else 2
    pipe = case.build()
    plain, cfg = run(case, pipe, prompts), case.name in W
    with Stg([LAYER], scale=1.5).apply(pipe) as applied:
        out = run(case, pipe, prompts)
    assert torch.equal(run(case, pipe, prompts), plain)
    no_gates(pipe.transformer)
    by_hand = Reference(pipe, case, w=W.get(case.name), cfg=cfg, s=1.5)
    if case.family == "sd3":  # the model asks its blocks before it adds what is from the ControlNet
        by_hand.weak.transformer_blocks[LAYER].context_pre_only = False
    close(out, run(case, pipe, prompts))
    assert not torch.allclose(out, plain, atol=1e-4), "the guidance did nothing"
    n, branches = len(find_blocks(case.build().transformer)), 2 if cfg else 1
    assert applied.stats.blocks_run == 3 * (branches * n + n - 1 - LAYER)


@pytest.mark.parametrize("name", ["flux_controlnet", "sd3_controlnet"])
def test_what_a_controlnet_adds_is_used(name):
    case = BY_CONTROL[name]
    pipe = case.build()
    with Stg([LAYER]).apply(pipe):
        guided = run(case, pipe)
        without = run(case, pipe, controlnet_conditioning_scale=0.0)
    assert not torch.allclose(guided, without, atol=1e-3)
