"""Skip guidance beside the skip guidance that Stable Diffusion 3 has itself."""

import torch
from helpers.stg_reference import LAYER, close, expected, guided

from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.pipes import BY_PIPE


def test_sd3_leaves_the_pipelines_own_skip_pass_alone():
    case = BY_PIPE["sd35"]
    call = {"skip_guidance_layers": [2], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    pipe = case.build()
    with Stg([LAYER], scale=0).apply(pipe):
        out = case.run(pipe, **call)
    assert torch.equal(out, case.run(pipe, **call))


def test_sd3s_own_skip_guidance_does_not_amplify_ours():
    """It adds a multiple of c - its own skipped pass, so what is added to c must be added to that pass too."""
    case = BY_PIPE["sd35"]
    call = {"skip_guidance_layers": [2], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    out, stats = guided(case, Stg([LAYER]), prompts=1, call=call)
    assert stats.delivery == "shift"
    close(out, expected(case, prompts=1, call=call))
