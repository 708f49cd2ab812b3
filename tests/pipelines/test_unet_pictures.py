"""Skip guidance on the pipelines of Stable Diffusion, 1.5 to XL, against a reference by hand."""

import pytest
import torch
from helpers.residue import no_gates
from helpers.unet_reference import UnetReference

from skipguide import SkipError, find_blocks
from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo import BY_NAME
from zoo.pipes_unet_picture import BY_PICTURE, PICTURE_PIPES, W

pytestmark = pytest.mark.numerics
LAYER, S = 1, 1.5
BROAD = ("sd", "sdxl")


def quick(*names):
    """All cases, those that are not named marked slow."""
    return [pytest.param(case, marks=[pytest.mark.slow][: case.name not in names]) for case in PICTURE_PIPES]


def weak(case, model, part="block", layer=LAYER):
    family = BY_NAME[case.family]
    return family.identity_block(model, layer) if part == "block" else family.zeroed(model, layer, part)


def by_hand(case, terms, cfg=True, prompts=2, w=W, call=None, **how):
    pipe = case.build()
    UnetReference(pipe.unet, w, [(edit(pipe.unet), s) for edit, s in terms], cfg=cfg, **how)
    return case.run(pipe, prompts, cfg, **(call or {}))


def close(out, expected):
    torch.testing.assert_close(out, expected, atol=5e-5 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("case", PICTURE_PIPES, ids=repr)
def test_guided_pipeline_equals_the_reference(case):
    cfg = case.cfg_modes[0] != "single"
    pipe = case.build()
    plain = case.run(pipe, 2)
    with Stg([LAYER], scale=S).apply(pipe) as applied:
        out = case.run(pipe, 2)
    assert torch.equal(case.run(pipe, 2), plain)
    no_gates(pipe.unet)
    assert (out - plain).norm() > 0.01 * plain.norm()
    close(out, by_hand(case, [(lambda model: weak(case, model), S)], cfg))
    n, branches, stats = len(find_blocks(pipe.unet)), 2 if cfg else 1, applied.stats
    steps = stats.passes // 2
    assert steps == 3 and stats.delivery == "shift"
    assert stats.blocks_run == steps * (branches * n + n - 1 - LAYER)
