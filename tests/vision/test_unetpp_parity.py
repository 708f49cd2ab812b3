"""UNet++ equals the reference: heads, nodes, losses, gradients, measures, sizes and checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny_unetpp import parameters
from safetensors.torch import load_file

import skipguide.vision.unetpp.network as unetpp
from skipguide.errors import SkipError
from skipguide.vision import UNetPlusPlus
from skipguide.vision.segmentation import MaskMeter, bce_dice_loss, deep_supervision_loss

pytestmark = pytest.mark.numerics

GOLDEN = Path(__file__).parents[1] / "golden" / "unetpp"


@pytest.fixture(scope="module")
def golden():
    tensors = load_file(GOLDEN / "unetpp_nested.safetensors")
    document = json.loads((GOLDEN / "unetpp_nested.json").read_text())
    model = UNetPlusPlus(classes=document["n_classes"], widths=document["channels"]).eval()
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    result = model.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in result.missing_keys)
    return model, tensors, document


@torch.no_grad()
def test_heads_and_nodes_equal_the_reference(golden):
    model, tensors, _ = golden
    walk = unetpp.NodeValues(model, tensors["input"])
    for i, j in model.nodes():
        torch.testing.assert_close(walk(i, j), tensors[f"act_eval/node{i}.{j}"], atol=5e-5, rtol=1e-5)
    for level, logits in enumerate(model(tensors["input"]), start=1):
        torch.testing.assert_close(logits, tensors[f"output_eval/head{level}"], atol=5e-5, rtol=1e-5)


def test_loss_and_gradients_equal_the_reference(golden):
    model, tensors, document = golden
    with torch.no_grad():
        heads = model(tensors["input"])
    for logits, expected in zip(heads, document["bce_dice_per_head_eval"], strict=True):
        assert bce_dice_loss(logits, tensors["target"]).item() == pytest.approx(expected, abs=1e-6)
    double = UNetPlusPlus(classes=2, widths=document["channels"]).eval().double()
    double.load_state_dict(model.state_dict())
    loss = deep_supervision_loss(double(tensors["input"].double()), tensors["target"].double())
    assert loss.item() == pytest.approx(document["loss_float64_eval"], abs=1e-10)
    loss.backward()
    for name, norm in document["grad_l2_float64_eval"].items():
        assert double.get_parameter(name).grad.norm().item() == pytest.approx(norm, rel=1e-8), name
    for key, expected in tensors.items():
        if key.startswith("grad_float64_eval/"):
            found = double.get_parameter(key.removeprefix("grad_float64_eval/")).grad
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)


@torch.no_grad()
def test_measures_equal_the_reference(golden):
    model, tensors, document = golden
    expected = [*document["iou_per_head_eval"], document["ensemble_mean_of_sigmoids_iou"]]
    for head, iou in zip([1, 2, 3, 4, "mean"], expected, strict=True):
        meter = MaskMeter(2)
        meter.update(model(tensors["input"], head=head), tensors["target"])
        assert meter.pooled_iou == pytest.approx(iou, abs=1e-6)


@torch.no_grad()
def test_pruning_of_the_reference(golden):
    model, tensors, document = golden
    for level in range(1, 5):
        smaller = model.pruned(level)
        assert parameters(smaller) == document["params_per_prune_level"][str(level)]
        nodes = {f"{i}.{j}" for i, j in model.run(tensors["input"], head=level).rows_run}
        assert nodes == set(document["nodes_executed_per_prune_level"][str(level)])
        assert torch.equal(smaller(tensors["input"]), model(tensors["input"], head=level))


def test_sizes_of_the_paper():
    with torch.device("meta"):
        assert parameters(UNetPlusPlus(deep_supervision=False)) == 9_163_329
        assert parameters(UNetPlusPlus()) == 9_163_428
        assert parameters(UNetPlusPlus(nested=False, deep_supervision=False)) == 7_852_545
        for level, count in enumerate((103_041, 519_105, 2_236_161, 9_163_329), start=1):
            assert parameters(UNetPlusPlus(depth=level, deep_supervision=False)) == count
    # and as an export, with the weights that count
    assert [parameters(UNetPlusPlus().pruned(level)) for level in (1, 3)] == [103_041, 2_236_161]


def test_reads_the_widespread_checkpoint_layout(golden):
    model, tensors, _ = golden
    state = {}
    for key, value in model.state_dict().items():
        kind, *place = key.split(".")
        if kind == "node":
            state[f"module.conv{place[0]}_{place[1]}.{'.'.join(place[2:])}"] = value
        else:
            state[f"module.final{place[0]}.{place[1]}"] = value
    again = UNetPlusPlus.from_reference_checkpoint(state)
    with torch.no_grad():
        assert torch.equal(again(tensors["input"], head=4), model(tensors["input"], head=4))
    for change, message in (
        ({"module.att.weight": torch.zeros(1)}, "att.weight.* too"),
        ({"module.conv0_1.conv9.weight": torch.zeros(1)}, "conv9.* too"),
        ({"module.conv1_1.conv1.weight": torch.zeros(2, 2, 3, 3)}, "shapes do not fit"),
    ):
        with pytest.raises(SkipError, match=message):
            UNetPlusPlus.from_reference_checkpoint(state | change)
    with pytest.raises(SkipError, match=r"lacks 'head\.4\.bias'"):
        UNetPlusPlus.from_reference_checkpoint({k: v for k, v in state.items() if k != "module.final4.bias"})
    with pytest.raises(SkipError, match="got NoneType"):
        UNetPlusPlus.from_reference_checkpoint(None)
    del state["module.conv0_1.conv1.bias"]
    with pytest.raises(SkipError, match="lacks"):
        UNetPlusPlus.from_reference_checkpoint(state)
    with pytest.raises(SkipError, match="expected keys"):
        UNetPlusPlus.from_reference_checkpoint({"a": torch.zeros(1)})
