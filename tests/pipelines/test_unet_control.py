"""Skip guidance on UNets with a ControlNet, a T2I-Adapter or an IP-Adapter, against a reference by hand."""

import pytest
import torch
from helpers.unet_reference import BY_CASE, LAYER, S, by_hand, check, close, guided

from skipguide.pipelines import SpatiotemporalSkipGuidance as Stg
from zoo.pipes_unet_control import UNET_CONTROL_PIPES

pytestmark = pytest.mark.numerics


@pytest.mark.parametrize("case", UNET_CONTROL_PIPES, ids=repr)
def test_guided_pipeline_equals_the_reference(case):
    check(case)


@pytest.mark.parametrize("name", ["sd_control", "animatediff_control", "sd_adapter", "sd_ip"])
def test_what_stands_beside_goes_with_its_rows(name):
    """In one batch with the skipped rows, and where a skipped pass begins at the first block."""
    case = BY_CASE[name]
    out, stats = guided(case, Stg([LAYER], scale=S, tail="batched"))
    close(out, by_hand(case))
    assert stats.passes == 3
    out, _ = guided(case, Stg([0], scale=S))
    close(out, by_hand(case, layer=0))


@pytest.mark.parametrize("name", ["sd_control", "sdxl_control"])
def test_residuals_of_the_conditional_branch_alone(name):
    """In guess mode the unconditional branch gets none: the skipped pass is the conditional one, and has them."""
    case, call = BY_CASE[name], {"guess_mode": True}
    out, _ = guided(case, Stg([LAYER], scale=S), call=call)
    close(out, by_hand(case, call=call))
    assert not torch.allclose(out, guided(case, Stg([LAYER], scale=S))[0], atol=1e-3)
