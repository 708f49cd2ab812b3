"""UNet++ reads the plain PyTorch UNet++'s checkpoints of any depth, in the forms they are saved in."""

import pytest
import torch

from skipguide import SkipError
from skipguide.vision import UNetPlusPlus


def published(model):
    """The weights under the plain PyTorch UNet++'s keys."""
    state = {}
    for key, value in model.state_dict().items():
        kind, first, rest = key.split(".", 2)
        if kind == "node":
            second, rest = rest.split(".", 1)
            state[f"conv{first}_{second}.{rest}"] = value
        else:
            state[f"final{first if model.deep_supervision else ''}.{rest}"] = value
    return state


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("widths", [(4, 6), (4, 6, 8), (4, 5, 6, 7, 8)])
@torch.no_grad()
def test_every_depth_in_every_form(widths, deep):
    torch.manual_seed(0)
    model = UNetPlusPlus(classes=2, deep_supervision=deep, widths=widths).eval()
    state, images = published(model), torch.rand(1, 3, 32, 16)
    old = {key: value for key, value in state.items() if "num_batches" not in key}  # of torch before 0.4
    for form in (state, {f"module.{key}": value for key, value in state.items()}, {"state_dict": state}, old):
        again = UNetPlusPlus.from_reference_checkpoint(form)
        assert torch.equal(again.run(images).logits, model.run(images).logits)


def test_keys_that_only_look_like_its_own_are_named():
    state = published(UNetPlusPlus(widths=(4, 6)))
    for key in ("conv0_0_1.conv1.weight", "conva_b.conv1.weight", "finale.weight"):
        with pytest.raises(SkipError, match=key):
            UNetPlusPlus.from_reference_checkpoint(state | {key: torch.zeros(1)})
    with pytest.raises(SkipError, match=r"conv0_0\.conv1\.bias"):
        UNetPlusPlus.from_reference_checkpoint(state | {"conv0_0.conv1.bias": "none"})
